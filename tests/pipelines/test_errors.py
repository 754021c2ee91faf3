from ray.exceptions import RayTaskError

from pipelines.errors import UserError, in_words


def wrapped(error: Exception) -> Exception:
    """As Ray raises it elsewhere: of both kinds, with a traceback for its text."""
    traceback = 'ray::MapWorker(...) (pid=1)\n  File "rows.py", line 120, in _read_footer\n    ^^^^^\n' + repr(error)
    return RayTaskError("f", traceback, error).as_instanceof_cause()


def test_what_ray_wraps_is_told_in_its_own_words():
    told = UserError("shard-00000.parquet is damaged (ZSTD); copy it back")
    assert isinstance(wrapped(told), UserError)
    assert in_words(wrapped(told)) == in_words(told) == "shard-00000.parquet is damaged (ZSTD); copy it back"
    assert in_words(wrapped(ValueError("a\n  b"))) == "ValueError: a b"
    assert in_words(ValueError("a\n  b"), last_line=True) == "ValueError: b"
    added = (
        f"{told}\nFailed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\nTo change retry attempts, ..."
    )
    assert in_words(wrapped(UserError(added))) == str(told), "Ray Data adds to an error's own text"
    assert in_words(MemoryError()) == "MemoryError: no message"
