"""A plan of a training run as text for a terminal, and as plain values."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipelines.amounts import amount, byte_size, columns
from pipelines.training.estimate import ROWS_PER_READ, Plan


def as_text(plan: Plan) -> str:
    """What a person reads before starting a run."""
    question, config = plan.question, plan.config
    device, counts = question.cluster.device, plan.counts
    exact, dense = plan.mean("exact.model"), plan.mean("dense.model")
    hours = plan.days * 24 * question.cluster.count
    lines = [
        f"{amount(counts.total)} parameters: embedding {amount(counts.embedding)}, attention "
        f"{amount(counts.attention)}, MLP {amount(counts.mlp)}, head {amount(counts.visual_head)} visual and "
        f"{amount(counts.other_head)} text rows",
        f"on {question.cluster} ({plan.peak_flops / 1e12:g} TFLOP/s {config.precision}, {device.memory_gb:g} GB each), "
        f"ZeRO-{plan.setup.stage}{', optimizer offloaded' if plan.setup.offloads('optimizer') else ''}, recomputing "
        f"{ {'none': 'nothing', 'selective': 'blocks but for attention', 'full': 'blocks'}[plan.setup.recompute] }",
        *plan.remarks,
        "",
        *columns(
            [
                ["rows", "steps", "a step", "a pass", "tokens/row", "tokens/step", "FLOPs/step", "as usual", "memory"],
                *([
                    str(bucket.rows), f"{bucket.share:.0%}", f"{bucket.rows_per_step} rows",
                    f"{bucket.rows_per_pass} rows", f"{bucket.tokens_per_row:,}", f"{bucket.tokens:,}",
                    f"{bucket.exact.model:.3g}", f"{bucket.dense.model:.3g}", byte_size(bucket.memory.peak),
                ] for bucket in plan.buckets),
            ],
            right=True,
        ),
        "",
        f"memory of a device at its highest, with {plan.peak.rows}: {byte_size(plan.peak.memory.peak)} of "
        f"{byte_size(plan.room)} usable",
        *_parts(plan.peak.memory.device),
        *(["  under ZeRO-3 up to a fifth more has been measured: leave room"] if plan.setup.stage == 3 else []),
        f"{plan.nodes} nodes of {min(question.devices_per_node, question.cluster.count)} devices, host memory of each: "
        f"{byte_size(sum(plan.node_memory.values()))}",
        *_parts(plan.node_memory),
        f"disk of a node: {byte_size(plan.node_disk_bytes)} of scratch, for checkpoints on their way",
        "",
        f"at {question.mfu:.0%} MFU (exact count; {question.mfu * dense / exact:.0%} by the usual count): "
        f"{plan.step_seconds:.3g} s a step, {plan.tokens_per_s:,.0f} tokens/s",
        f"{plan.steps:,} steps, {amount(plan.steps * plan.mean('tokens'))} tokens: {_time(plan.days * 86400)}, "
        f"{f'{hours:,.0f}' if hours >= 10 else f'{hours:.2g}'} device hours, "
        f"{plan.steps * exact:.3g} FLOPs ({plan.steps * dense:.3g} as usual)",
    ]  # fmt: skip
    if plan.epochs is not None:
        lines.append(f"dataset: {byte_size(question.dataset_bytes or 0)}, {plan.epochs:.3g} passes over it")
    kept = config.checkpoint.keep + 1
    lines += [
        f"checkpoints: {byte_size(plan.checkpoint_bytes)} each, {byte_size(kept * plan.checkpoint_bytes)} for the "
        f"{config.checkpoint.keep} kept and the one being written; one every {config.checkpoint.every} steps "
        f"({_time(config.checkpoint.every * plan.step_seconds)})",
        f"network: {byte_size(plan.network_bytes)} a device and step, "
        f"{byte_size(plan.network_bytes / plan.step_seconds)}/s to take as long as the step itself; "
        f"reading: {byte_size(plan.read_bytes_per_s)}/s for all workers",
        f"from S3: {plan.s3_reads_per_s:.3g} GET/s at most for all workers "
        f"({plan.s3_reads_per_s / question.cluster.count:.3g} for one), as one gives {ROWS_PER_READ} rows or more",
    ]
    lines += ["computed from", *(f"  {each}" for each in plan.grounds)]
    if not plan.fits:
        lines += ["", *_refusal(plan)]
    return "\n".join(lines)


def as_values(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it; sizes in bytes."""
    question = plan.question
    return {
        "schema": 1,
        "cluster": asdict(question.cluster),
        "parameters": asdict(plan.counts) | {"total": plan.counts.total},
        "buckets": [asdict(bucket) | {"rows": str(bucket.rows)} for bucket in plan.buckets],
        "memory_peak": plan.peak.memory.peak,
        "memory_usable": plan.room,
        "fits": plan.fits,
        "would_fit": [{"changes": changes, "memory_peak": peak} for changes, peak in plan.fitting],
        "node_memory": plan.node_memory,
        "remarks": list(plan.remarks),
        "grounds": list(plan.grounds),
        "mfu": question.mfu,
        "step_seconds": plan.step_seconds,
        "tokens_per_step": plan.mean("tokens"),
        "tokens_per_s": plan.tokens_per_s,
        "flops_per_step": {
            "exact": plan.mean("exact.model"),
            "dense": plan.mean("dense.model"),
            "hardware": plan.mean("exact.hardware"),
        },
        "steps": plan.steps,
        "epochs": plan.epochs,
        "days": plan.days,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "nodes": plan.nodes,
        "node_disk_bytes": plan.node_disk_bytes,
        "dataset_bytes": question.dataset_bytes,
        "s3_gets_per_s": plan.s3_reads_per_s,
        "network_bytes_per_step": plan.network_bytes,
        "read_bytes_per_s": plan.read_bytes_per_s,
    }


def _refusal(plan: Plan) -> list[str]:
    cluster = plan.question.cluster
    lines = [
        f"does not fit: {plan.peak.rows} needs {byte_size(plan.peak.memory.peak)} of {byte_size(plan.room)} usable on "
        f"{cluster.device.name}."
    ]
    if not plan.fitting:
        return [*lines, "no key helps on this cluster: take devices with more memory, or more of them with ZeRO-3"]
    return [*lines, "it would with any of:", *(f"  {changes}  ({byte_size(peak)})" for changes, peak in plan.fitting)]


def _parts(parts: Mapping[str, float]) -> list[str]:
    return [f"  {name:26s}{byte_size(size):>10s}" for name, size in sorted(parts.items(), key=lambda item: -item[1])]


def _time(seconds: float) -> str:
    for unit, size, least in (("days", 86400, 2), ("hours", 3600, 2), ("min", 60, 2)):
        if seconds >= least * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
