"""What common GPUs can compute at most, to say which share of it a run reaches."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """Dense matrix products in TFLOP/s, summed in fp32; None where the chip has no such unit."""

    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float


# By what torch.cuda.get_device_name says, without the maker's name. Values are those of the makers' data sheets without
# their factor of two for sparse matrices, for gaming cards those of the architecture's white paper with fp32 sums.
# A name must match as a whole: a laptop's or a cut-down chip is another chip, and a part of one (MIG) as well.
PEAKS: dict[str, Peak] = {
    # NVIDIA Blackwell: DGX/HGX B200 and GB200 NVL72 data sheets; RTX Blackwell white paper, table 1
    r"B200": Peak(2250, 2250, 1125, 75),
    r"GB200": Peak(2500, 2500, 1250, 80),
    r"RTX 5090": Peak(209.5, 209.5, 104.8, 104.8),
    # NVIDIA Hopper: H100 white paper, table 2; H100 and H200 data sheets
    r"H100( SXM5)?( 80GB HBM3)?": Peak(989.4, 989.4, 494.7, 66.9),
    r"H100 PCIe": Peak(756, 756, 378, 51.2),
    r"H100 NVL": Peak(835.5, 835.5, 417.5, 60),
    r"H200": Peak(989.4, 989.4, 494.7, 66.9),
    r"H200 NVL": Peak(835.5, 835.5, 417.5, 60),
    r"H800": Peak(989.4, 989.4, 494.7, 66.9),
    r"GH200 (480GB|120GB|144G HBM3e)": Peak(989.4, 989.4, 494.7, 66.9),
    # NVIDIA Ada: L4, L40, L40S and RTX 6000 Ada data sheets; Ada GPU architecture white paper, appendix A
    r"L4": Peak(121, 121, 60, 30.3),
    r"L40": Peak(181, 181, 90.5, 90.5),
    r"L40S": Peak(362, 362, 183, 91.6),
    r"RTX 6000 Ada Generation": Peak(364.2, 364.2, 182.1, 91.1),
    r"RTX 4090": Peak(165.2, 165.2, 82.6, 82.6),
    r"RTX 4080": Peak(97.5, 97.5, 48.7, 48.7),
    # NVIDIA Ampere: A100, A30, A10, A40 data sheets; GA102 white paper, appendices A and B
    r"A100-(SXM4|SXM|PCIE|PCIe)-(40|80)GB": Peak(312, 312, 156, 19.5),
    r"A100 80GB PCIe": Peak(312, 312, 156, 19.5),
    r"A800.*80GB.*": Peak(312, 312, 156, 19.5),
    r"A30": Peak(165, 165, 82, 10.3),
    r"A10": Peak(125, 125, 62.5, 31.2),
    r"A10G": Peak(70, 70, 35, 35),
    r"A40": Peak(149.7, 149.7, 74.8, 37.4),
    r"RTX A6000": Peak(154.8, 154.8, 77.4, 38.7),
    r"RTX 3090": Peak(71, 71, 35.6, 35.6),
    r"RTX 3090 Ti": Peak(80, 80, 40, 40),
    r"RTX 3080": Peak(59.5, 59.5, 29.8, 29.8),
    # NVIDIA Volta and Turing: V100, V100S and T4 data sheets
    r"V100-SXM2-(16|32)GB(-LS)?": Peak(None, 125, None, 15.7),
    r"V100-PCIE-(16|32)GB": Peak(None, 112, None, 14),
    r"V100S-PCIE-32GB": Peak(None, 130, None, 16.4),
    r"T4": Peak(None, 65, None, 8.1),
    # AMD: Instinct MI300X data sheet
    r"MI300X": Peak(1307.4, 1307.4, 653.7, 163.4),
}


# GiB of memory of one GPU, by the same names and sheets; where a name says its own, that is taken.
MEMORY: dict[str, float] = {
    r"B200": 180,
    r"GB200": 185,
    r"RTX 5090": 32,
    r"H100( SXM5)?( 80GB HBM3)?": 80,
    r"H100 PCIe": 80,
    r"H100 NVL": 94,
    r"H200": 141,
    r"H200 NVL": 141,
    r"H800": 80,
    r"GH200 (480GB|120GB)": 96,
    r"GH200 144G HBM3e": 144,
    r"L4": 24,
    r"L40": 48,
    r"L40S": 48,
    r"RTX 6000 Ada Generation": 48,
    r"RTX 4090": 24,
    r"RTX 4080": 16,
    r"A30": 24,
    r"A10": 24,
    r"A10G": 24,
    r"A40": 48,
    r"RTX A6000": 48,
    r"RTX 3090( Ti)?": 24,
    r"RTX 3080": 10,
    r"T4": 16,
    r"MI300X": 192,
}


def memory_gib(name: str) -> float | None:
    """GiB of a GPU by its name; None where it is not known."""
    bare = bare_name(name)
    for pattern, size in MEMORY.items():
        if re.fullmatch(pattern, bare):
            return size
    own = re.search(r"\b(\d+)GB", bare)
    return float(own.group(1)) if own and any(re.fullmatch(pattern, bare) for pattern in PEAKS) else None


def chip_named(name: str) -> str:
    """`name`, where it is that of a GPU whose peak is known. Raises ValueError that lists those."""
    if not any(re.fullmatch(pattern, bare_name(name)) for pattern in PEAKS):
        raise ValueError(
            f"trainer.plan_chip={name} is not a GPU that is known here; these are: {', '.join(known_names())}"
        )
    return name


def known_names() -> list[str]:
    """A name for each of the GPUs of PEAKS, without what a pattern leaves open and with the first of what it offers."""
    names = (re.sub(r"\([^)]*\)\?", "", pattern).replace(".*", " ") for pattern in PEAKS)
    return [" ".join(re.sub(r"\(([^|)]*)[^)]*\)", r"\1", name).split()) for name in names]


def bare_name(name: str) -> str:
    """A GPU's name without its maker's."""
    return re.sub(r"^(NVIDIA |AMD |Tesla |GeForce |Instinct |Graphics Device )+", "", name.strip())


def peak_tflops(name: str, precision: str) -> float | None:
    """TFLOP/s of a GPU by its name, in bf16, fp16, tf32 or fp32; None where it is not known."""
    bare = bare_name(name)
    for pattern, peak in PEAKS.items():
        if re.fullmatch(pattern, bare):
            return getattr(peak, precision)
    return None


def device_peak(device: torch.device, dtype: torch.dtype, *, convolutional: bool) -> tuple[str, str, float | None]:
    """How a device is called, what it multiplies in, and its TFLOP/s, None where unknown and for a CPU.

    fp32 is tf32 where torch's settings allow that, which by default they do in convolutions and not elsewhere.
    """
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    if device.type != "cuda":
        return device.type, precision, None
    tf32 = torch.get_float32_matmul_precision() != "highest" or (convolutional and torch.backends.cudnn.allow_tf32)
    if precision == "fp32" and tf32:
        precision = "tf32"
    name = torch.cuda.get_device_name(device)
    return name, precision, peak_tflops(name, precision)
