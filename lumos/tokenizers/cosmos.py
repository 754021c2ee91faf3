"""NVIDIA's Cosmos video tokenizer (DV4x8x8) from its TorchScript files, `encoder.jit` and `decoder.jit`.

The files silently pad a wrong number of frames and decode codes that do not exist, so both are checked here. A
TorchScript file runs code when it is loaded: only the folder that the user named is ever read, and the hash of what
was loaded is part of the tokenizer's identity.
"""

import hashlib
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Int64, UInt8
from torch import Tensor

from lumos.compression import COMPRESSION, num_source_frames
from lumos.tokenizers.video import check_codes, check_frames, frames_to_unit, unit_to_frames

CODEBOOK_SIZE = 64_000  # FSQ levels 8, 8, 8, 5, 5, 5
FILES = ("encoder.jit", "decoder.jit")
REPOSITORY = "nvidia/Cosmos-0.1-Tokenizer-DV4x8x8"


class CosmosTokenizer:
    """A `VideoTokenizer` over two TorchScript files; float32 on CPU, where they fail in bfloat16.

    Attributes:
        file_hashes: "sha256:..." of each file; `weights_hash` is made of both.
    """

    kind = "cosmos"
    codebook_size = CODEBOOK_SIZE
    compression = COMPRESSION

    def __init__(self, folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        """Load encoder.jit and decoder.jit of a folder; in bfloat16 on CUDA, else float32, if no dtype is given.

        Raises:
            FileNotFoundError: A file is absent.
            ValueError: A file is no TorchScript, or `dtype` is not float32 on CPU.
        """
        root = Path(folder)
        missing = [name for name in FILES if not (root / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"the Cosmos tokenizer needs {' and '.join(missing)} in {root}; download them from {REPOSITORY} on "
                "Hugging Face, or use one in the package (tokenizer kind fsq-footage), which needs no files"
            )
        self.device = torch.device(device)
        self._dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        if self.device.type == "cpu" and self._dtype != torch.float32:
            raise ValueError(f"dtype is {self._dtype}; the Cosmos files compute in float32 only on CPU")
        self.file_hashes = {}
        for name in FILES:
            with (root / name).open("rb") as file:
                self.file_hashes[name] = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        joined = " ".join(self.file_hashes[name] for name in FILES)
        self.weights_hash = "sha256:" + hashlib.sha256(joined.encode()).hexdigest()
        self._encoder, self._decoder = (self._load(root / name) for name in FILES)

    def _load(self, path: Path) -> torch.jit.ScriptModule:
        try:
            module: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=self.device)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a TorchScript file: {str(error).splitlines()[0]}") from error
        module.to(self._dtype).eval()
        return module

    @torch.inference_mode()
    def encode(self, frames: UInt8[Tensor, "batch time height width 3"]) -> Int64[Tensor, "batch t h w"]:
        """As `VideoTokenizer.encode`; a ValueError too if the file gives something else than codes."""
        shape = (frames.shape[0], *check_frames(frames))
        video = rearrange(frames_to_unit(frames.to(self.device)), "b t h w c -> b c t h w")
        codes: Tensor = self._encoder(video.to(self._dtype))[0]
        if tuple(codes.shape) != shape:
            raise ValueError(f"encoder.jit gave codes of shape {list(codes.shape)} where {list(shape)} was expected")
        check_codes(codes, self.codebook_size)
        return codes.long().cpu()

    @torch.inference_mode()
    def decode(self, codes: Int64[Tensor, "batch t h w"]) -> UInt8[Tensor, "batch time height width 3"]:
        """As `VideoTokenizer.decode`."""
        check_codes(codes, self.codebook_size)
        video: Tensor = self._decoder(codes.to(self.device, torch.int32))
        frames = num_source_frames(codes.shape[1])
        if video.shape[2] != frames:
            raise ValueError(f"decoder.jit gave {video.shape[2]} frames where {frames} were expected")
        return unit_to_frames(rearrange(video.float(), "b c t h w -> b t h w c")).cpu()
