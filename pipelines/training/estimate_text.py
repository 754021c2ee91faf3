"""A plan of a training run as text for a terminal, and as plain values."""

from collections.abc import Mapping
from typing import Any

from pipelines.training.estimate import Plan


def as_text(plan: Plan) -> str:
    """What a person reads before starting a run."""
    question, config = plan.question, plan.config
    device, counts = question.cluster.device, plan.counts
    lines = [
        f"{counts.total / 1e9:.2f} B parameters: embedding {_count(counts.embedding)}, attention "
        f"{_count(counts.attention)}, MLP {_count(counts.mlp)}, head {_count(counts.visual_head)} visual and "
        f"{_count(counts.other_head)} text rows",
        f"on {question.cluster} ({device.tflops:g} TFLOP/s bf16, {device.memory_gb:g} GB each), ZeRO-{plan.setup.stage}"
        f"{', optimizer offloaded' if plan.setup.offloads_optimizer else ''}, recomputing "
        f"{ {'none': 'nothing', 'selective': 'blocks but for attention', 'full': 'blocks'}[plan.setup.checkpointing] }",
        "",
        *_table(
            ["rows", "steps", "a step", "a pass", "tokens/row", "tokens/step", "FLOPs/step", "as usual", "memory"],
            [
                [
                    str(bucket.rows), f"{bucket.share:.0%}", f"{bucket.rows_per_step} rows",
                    f"{bucket.rows_per_pass} rows", f"{bucket.tokens_per_row:,}", f"{bucket.tokens:,}",
                    f"{bucket.exact.model:.3g}", f"{bucket.dense.model:.3g}", _bytes(bucket.memory.peak),
                ]
                for bucket in plan.buckets
            ],
        ),
        "",
        f"memory of a device at its highest, with {plan.peak.rows}: {_bytes(plan.peak.memory.peak)} of "
        f"{_bytes(plan.room)} usable",
        *_parts(plan.peak.memory.device),
        *(["  under ZeRO-3 up to a fifth more has been measured: leave room"] if plan.setup.stage == 3 else []),
        f"host memory of a node ({min(question.devices_per_node, question.cluster.count)} devices): "
        f"{_bytes(sum(plan.node_memory.values()))}",
        *_parts(plan.node_memory),
        "",
        f"at {question.mfu:.0%} MFU (exact count; {question.mfu * plan.mean('dense') / plan.mean('exact'):.0%} by the "
        f"usual count): {plan.step_seconds:.3g} s a step, {plan.tokens_per_s:,.0f} tokens/s",
        f"{plan.steps:,} steps, {_count(plan.steps * plan.mean('tokens'))} tokens: {_days(plan.days)}, "
        f"{plan.days * 24 * question.cluster.count:,.0f} device hours, "
        f"{plan.steps * plan.mean('exact'):.3g} FLOPs ({plan.steps * plan.mean('dense'):.3g} as usual)",
    ]  # fmt: skip
    if question.dataset_tokens:
        epochs = plan.steps * plan.mean("tokens") / question.dataset_tokens
        lines.append(f"dataset: {_bytes(question.dataset_bytes or 0)}, about {epochs:.3g} passes over it")
    kept = config.checkpoint.keep + 1
    lines += [
        f"checkpoints: {_bytes(plan.checkpoint_bytes)} each, {_bytes(kept * plan.checkpoint_bytes)} for the "
        f"{config.checkpoint.keep} kept and the one being written; one every {config.checkpoint.every} steps "
        f"({config.checkpoint.every * plan.step_seconds / 60:.3g} min)",
        f"network: {_bytes(plan.network_bytes)} a device and step, {_bytes(plan.network_bytes / plan.step_seconds)}/s "
        f"to take as long as the step itself; reading: {_bytes(plan.read_bytes_per_s)}/s for all workers",
    ]
    if not plan.fits:
        lines += ["", *_refusal(plan)]
    return "\n".join(lines)


def as_values(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it; sizes in bytes."""
    question = plan.question
    return {
        "schema": 1,
        "cluster": {"count": question.cluster.count, "device": dict(vars(question.cluster.device))},
        "parameters": {**vars(plan.counts), "total": plan.counts.total},
        "buckets": [
            {
                "rows": str(bucket.rows),
                "share": bucket.share,
                "rows_per_step": bucket.rows_per_step,
                "rows_per_pass": bucket.rows_per_pass,
                "tokens_per_row": bucket.tokens_per_row,
                "exact": {
                    name: dict(vars(getattr(bucket.exact, name))) for name in ("forward", "backward", "recomputed")
                },
                "dense": {name: dict(vars(getattr(bucket.dense, name))) for name in ("forward", "backward")},
                "memory": dict(bucket.memory.device),
            }
            for bucket in plan.buckets
        ],
        "memory_peak": plan.peak.memory.peak,
        "memory_usable": plan.room,
        "fits": plan.fits,
        "would_fit": [{"changes": changes, "memory_peak": peak} for changes, peak in plan.fitting],
        "node_memory": plan.node_memory,
        "mfu": question.mfu,
        "step_seconds": plan.step_seconds,
        "tokens_per_step": plan.mean("tokens"),
        "tokens_per_s": plan.tokens_per_s,
        "flops_per_step": {name: plan.mean(name) for name in ("exact", "dense", "hardware")},
        "steps": plan.steps,
        "days": plan.days,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "network_bytes_per_step": plan.network_bytes,
        "read_bytes_per_s": plan.read_bytes_per_s,
    }


def _refusal(plan: Plan) -> list[str]:
    cluster = plan.question.cluster
    lines = [
        f"does not fit: {plan.peak.rows} needs {_bytes(plan.peak.memory.peak)} of {_bytes(plan.room)} usable on "
        f"{cluster.device.name}."
    ]
    if not plan.fitting:
        return [*lines, "no key helps on this cluster: take devices with more memory, or more of them with ZeRO-3"]
    return [*lines, "it would with any of:", *(f"  {changes}  ({_bytes(peak)})" for changes, peak in plan.fitting)]


def _parts(parts: Mapping[str, float]) -> list[str]:
    return [f"  {name:26s}{_bytes(size):>10s}" for name, size in sorted(parts.items(), key=lambda item: -item[1])]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in (head, *rows)) for index in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]


def _count(value: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _days(days: float) -> str:
    return f"{days:.3g} days" if days >= 2 else f"{24 * days:.3g} hours"
