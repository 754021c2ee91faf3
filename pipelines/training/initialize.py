"""The first weights of a run: drawn, or those of a checkpoint, put into a decoder that is made where it will train.

No worker ever holds the model in float32 on its CPU. The decoder is made without storage, given memory on its device in
the type it trains in, and filled piece by piece: rank 0 draws or reads a piece, the others receive the tensor. Under
ZeRO-3 each tensor is gathered, filled and partitioned again.

A Llama or Chameleon checkpoint lends what it has. Its rows of the text vocabulary are kept bit for bit, in embedding
and head; rows of markup and visual codes are drawn as from scratch; Llama's missing norms of queries and keys begin at
identity.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lumos.checkpoint import parse_config
from lumos.config import ModelConfig, TokenizerInfo, from_release_config
from lumos.decoder import Decoder, fill_initially
from lumos.vocabulary import Vocabulary
from pipelines.errors import UserError
from pipelines.streams import torch_stream
from pipelines.training.config import TrainConfig
from pipelines.training.engine import engine_settings, parameter_dtype
from pipelines.training.weights_source import PIECE, WeightsSource, compare, open_source

logger = logging.getLogger(__name__)

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FREE = {"max_seq_len"}  # fields of the model's shape that no weight depends on
_FREE_OF_TEXT_MODELS = {*_FREE, "vocab_size", "visual_start", "rope", "position_scale", "model_parallel_size"}


def build_decoder(
    config: TrainConfig, model: ModelConfig, vocabulary: Vocabulary, *, device: torch.device, train_text: bool = False
) -> Decoder:
    """A run's decoder with its first weights, on a device, in the type that DeepSpeed will hold it in.

    Every worker must call it, within an initialised process group. Under ZeRO-3 the parameters come out partitioned.
    """
    settings = engine_settings(config)
    weights = FirstWeights(config, model, vocabulary) if dist.get_rank() == 0 else None
    if settings.get("zero_optimization", {}).get("stage") == 3:
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=settings):  # its argument dtype is not heeded on a CPU
            decoder = Decoder(model, train_text=train_text)
        if not train_text:  # a buffer, which stays whole, in float32
            decoder.lm_head.text = torch.zeros(decoder.lm_head.text.shape, dtype=torch.float32, device=device)
        _fill(decoder, weights, partitioned=True)
        return decoder
    with torch.device("meta"):
        decoder = Decoder(model, train_text=train_text)
    for parameter in decoder.parameters():
        parameter.data = parameter.data.to(parameter_dtype(config))
    decoder.to_empty(device=device)
    _fill(decoder, weights, partitioned=False)
    return decoder


def check_init_from(
    uri: str, model: ModelConfig, vocabulary: Vocabulary, tokenizer: TokenizerInfo | None = None
) -> None:
    """Compare the config and the headers of a checkpoint with what a run wants to begin from it.

    That its visual codes were those of another tokenizer than the run's is warned of.

    Raises:
        UserError: if they do not fit; the message names keys, shapes and what to change.
    """
    source = open_source(uri)
    try:
        if source.family == "lumos":
            found, found_vocabulary, info = parse_config(dict(source.config), f"{source.uri}/config.json")
            _check_fields(uri, "vocabulary", vars(found_vocabulary), vars(vocabulary))
            if info.tokenizer or vocabulary == Vocabulary.lumos1():
                _compare_tokenizers(uri, info.tokenizer, tokenizer)
            free = _FREE
        else:
            found = from_release_config({**source.config, "tie_word_embeddings": False})
            free = _FREE_OF_TEXT_MODELS
            _check_text_model(source, found, vocabulary)
    except ValueError as error:
        raise UserError(f"init_from: {error}") from error
    _check_fields(uri, "shape", vars(found), {key: value for key, value in vars(model).items() if key not in free})
    with torch.device("meta"):
        decoder = Decoder(model)
    expected = {key: tuple(tensor.shape) for key, tensor in decoder.state_dict().items()}
    optional: set[str] = set()
    if source.family != "lumos":
        expected |= dict.fromkeys((_EMBEDDING, _HEAD), (found.vocab_size, found.hidden_size))
        optional = {_HEAD} if source.config.get("tie_word_embeddings") else set()
        norms = {key for key in expected if ".q_norm." in key or ".k_norm." in key}
        optional |= norms if source.family == "llama" else set()
        for key in norms & source.tensors.keys():  # Hugging Face repeats those of Chameleon for every head
            heads = model.num_heads if ".q_norm." in key else model.num_kv_heads
            if source.tensors[key].shape == (heads, model.head_dim):
                expected[key] = (heads, model.head_dim)
    compare(source, expected, frozenset(optional))


def _compare_tokenizers(uri: str, theirs: TokenizerInfo | None, ours: TokenizerInfo | None) -> None:
    """Warn where the same codes mean other pictures; a release names no tokenizer, and was trained on Cosmos codes."""
    if ours is None or (ours.kind == "cosmos" if theirs is None else ours.weights_hash == theirs.weights_hash):
        return
    named = f"{theirs.kind} ({theirs.weights_hash})" if theirs else "cosmos"
    logger.warning(
        "init_from: %s was trained on the codes of the tokenizer %s, this run's are of %s (%s): the same codes mean "
        "other pictures, so that what it knows of them is lost",
        uri,
        named,
        ours.kind,
        ours.weights_hash,
    )


def _check_text_model(source: WeightsSource, found: ModelConfig, vocabulary: Vocabulary) -> None:
    """Check that the ids of a Llama or Chameleon checkpoint mean the same in the run's vocabulary."""
    if source.family == "llama" and vocabulary == Vocabulary.lumos1():
        raise ValueError(
            f"{source.uri} is a Llama checkpoint, among whose words the Lumos-1 vocabulary has its markup: set "
            "data.vocabulary to compact and data.text_tokenizer to the checkpoint's tokenizer.json"
        )
    if vocabulary.text_vocab_size > found.vocab_size:
        raise ValueError(
            f"{source.uri} has {found.vocab_size} words, the run's text tokenizer {vocabulary.text_vocab_size}: set "
            "data.text_tokenizer to the checkpoint's tokenizer.json"
        )
    if source.config.get("rope_scaling"):
        logger.warning(
            "init_from: %s stretches its rotary positions (rope_scaling), which this model does not; its text ability "
            "will suffer until it is trained",
            source.uri,
        )


def _check_fields(uri: str, what: str, found: dict[str, Any], asked: dict[str, Any]) -> None:
    different = [key for key in asked if found[key] != asked[key]]
    if different:
        raise UserError(
            f"init_from = {uri}: a checkpoint of another {what}: "
            f"it has {', '.join(f'{key} = {found[key]}' for key in different)}; this run has "
            f"{', '.join(f'{key} = {asked[key]}' for key in different)}. Set the run's config to the checkpoint's, "
            "or leave init_from out"
        )


class FirstWeights:
    """Values of every parameter, in pieces, in the order of the parameters.

    Drawn values come from one stream in the order of ``Decoder.init_weights``. A tensor drawn in pieces equals one that
    is drawn whole if every piece but the last has a multiple of 16 values: torch draws so many at a time.
    """

    def __init__(self, config: TrainConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.source = open_source(config.init_from) if config.init_from else None
        self._generator = torch_stream(config.seed, "init")

    def pieces(self, key: str, shape: torch.Size, rows: slice) -> Iterator[tuple[int, Tensor]]:
        """Of some ``rows`` of a key's tensor, in a part of that shape: the place in the flattened part, and values."""
        width, source = shape[1:].numel(), self.source
        first, stop = rows.start * width, rows.stop * width
        kept = first
        if source is not None:
            stored = source.tensors.get(key)
            if key in (_EMBEDDING, _HEAD) and source.family != "lumos":
                kept = max(first, min(stop, self.vocabulary.text_vocab_size * width))
                lender = key if stored else _EMBEDDING  # tied: the head is the embedding
                yield from ((place - first, values) for place, values in source.read(lender, first, kept))
            elif stored is not None and key not in (_EMBEDDING, _HEAD) and stored.shape != tuple(shape):
                yield from self._norm_of_blocks(key, shape)
                return
            elif stored is not None:
                yield from ((place - first, values) for place, values in source.read(key, first, stop))
                return
        yield from ((place - first, values) for place, values in self._new(key, kept, stop))

    def _new(self, key: str, first: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        while first < stop:
            count = min(PIECE, stop - first)
            if 0 < stop - first - count < 16:  # torch draws fewer than 16 in another way
                count = stop - first
            piece = torch.empty(count)
            fill_initially(piece, key, self.model.num_layers, self._generator)
            yield first, piece
            first += count

    def _norm_of_blocks(self, key: str, shape: torch.Size) -> Iterator[tuple[int, Tensor]]:
        """Chameleon's norms of queries and keys, which Hugging Face repeats for every head, as one row a block."""
        assert self.source is not None
        stored = self.source.tensors[key].shape
        whole = torch.cat([piece for _, piece in self.source.read(key, 0, stored[0] * stored[1])])
        blocks = whole.view(shape[0], -1, shape[1])
        if not torch.equal(blocks, blocks[:, :1].expand_as(blocks)):
            raise UserError(f"init_from: {key} of {self.source.uri} differs between heads that share it in this model")
        yield 0, blocks[:, 0].flatten()


def _fill(decoder: Decoder, weights: FirstWeights | None, *, partitioned: bool) -> None:
    """Put values into every weight on the worker that has them, and share them with the others."""
    import deepspeed

    for weight, key, rows in decoder.weight_parts():
        gathered = partitioned and isinstance(weight, nn.Parameter)
        with torch.no_grad(), deepspeed.zero.GatheredParameters(weight, modifier_rank=0, enabled=gathered):
            if weights is not None:
                flat = weight.view(-1)
                rows = rows if key == _HEAD else slice(0, len(weight))  # of a gathered one, known only now
                for start, values in weights.pieces(key, weight.shape, rows):
                    flat[start : start + len(values)].copy_(values)
        if not gathered and weight.numel():
            dist.broadcast(weight.detach(), src=0)
