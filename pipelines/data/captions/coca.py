"""Captions by CoCa (Yu et al. 2022, arXiv 2205.01917), a captioner of open_clip that runs where the pipeline runs."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pipelines.data.captions.captioner import CAPTIONED, Captioner, clean_captions
from pipelines.data.config import CurateConfig
from pipelines.data.models.open_clip import OpenClip, check_open_clip, in_batches, load_open_clip, open_clip_hash
from pipelines.data.settings import CocaConfig
from pipelines.data.stage.stage import Row, Stage
from pipelines.data.steps.run import Check, check_device
from pipelines.data.video.looks import decode_jpeg, looks_settings, read_looks

STAGE = "captions-coca"
_KEY = "captions.coca.weights"
_START, _END = 49406, 49407  # of the CLIP tokenizer


class CocaFunction:
    """Captions the middle frame of clips."""

    def __init__(self, uri: str, *, config: CocaConfig, captioner: str, threads: int) -> None:
        del uri  # nothing is recorded beside the table
        torch.set_num_threads(threads)
        self.config = config
        self.captioner = captioner
        self.model = load_open_clip(config.open_clip, _KEY)

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """A caption for each clip, or why there is none."""
        done, images = [], []
        for row, looks in read_looks(rows):
            made: Row = {"work_key": row["work_key"], "key": row["key"], "captions": [], "error": looks.error}
            done.append(made)
            if not looks.error:
                images.append((made, self.model.images([decode_jpeg(looks.middle)])))
        if images:
            caption = partial(caption_images, coca=self.model, max_tokens=self.config.max_tokens)
            tokens = in_batches(caption, torch.cat([image for _, image in images]), self.config.batch_size)
            for (made, _), row in zip(images, tokens.tolist(), strict=True):
                made["captions"] = clean_captions([_text(self.model, row)], self.captioner)
        return done


@torch.inference_mode()
def caption_images(images: Tensor, *, coca: OpenClip, max_tokens: int) -> Tensor:
    """The likeliest next token, again and again, from each image [batch, 3, size, size]: [batch, 1 + max_tokens].

    open_clip's own search needs the package transformers, draws at random, or both.
    """
    image = coca.model(images)
    known = {"image_latent": image["image_features"], "image_embs": image["image_embs"], "output_labels": False}
    tokens = torch.full((len(images), 1 + max_tokens), _END, device=coca.device)
    tokens[:, 0] = _START
    over = torch.zeros(len(images), dtype=torch.bool, device=coca.device)
    for place in range(1, 1 + max_tokens):
        logits = coca.model(images, tokens[:, :place], **known)["logits"]
        tokens[:, place] = logits[:, -1].argmax(dim=-1).masked_fill(over, _END)
        over |= tokens[:, place] == _END
        if over.all():
            break
    return tokens


def _text(coca: OpenClip, tokens: Sequence[int]) -> str:
    words = [token for token in tokens[1:] if token != _END]
    text: str = coca.tokenizer.decode(words)  # type: ignore[attr-defined]
    return text.replace("<start_of_text>", "").strip(" .") + "." if words else ""


def coca_stage(curate: CurateConfig) -> Stage:
    """The stage that captions with CoCa.

    Raises:
        UserError: the weights are not there.
    """
    config, resources = curate.captions.coca, curate.resources.of(STAGE)
    digest = open_clip_hash(config.open_clip, _KEY)
    name = config.model if " " in digest else "coca"  # a folder of weights has no name but its hash
    captioner = f"{name}@{digest[-64:][:8]}"
    return Stage(
        name=STAGE,
        settings={
            "version": 2,
            "looks": looks_settings(curate.looks),
            "captioner": captioner,
            "model": digest,
            "max_tokens": config.max_tokens,
            "batch_size": config.batch_size,
        },
        schema=CAPTIONED,
        function=partial(CocaFunction, config=config, captioner=captioner, threads=resources.threads),
        rows_per_part=64,
        resources=resources,
    )


def _checks(curate: CurateConfig) -> Sequence[Check]:
    config = curate.captions.coca
    return (
        Check(STAGE, partial(check_open_clip, config.open_clip, _KEY), costly=True),
        Check(STAGE, partial(check_device, "captions.coca.device", config.device)),
    )


COCA = Captioner(name="coca", stage_name=STAGE, stage=coca_stage, checks=_checks)
