"""What GPUs are said to do at best: a table of cards, for those that a user has and for those that a user has not."""

from dataclasses import dataclass

import torch

from galore_pretrain.errors import InputError

_GIB = 2**30
_NO_PART_OF_A_NAME = ("nvidia", "geforce", "rtx", " ", "-", "_")


@dataclass(frozen=True)
class Card:
    """Says what a card does at best, in units of 10¹² and 10⁹ as its vendor does.

    ``int8``: dense TOP/s of products of 8-bit integers. ``bf16``: TFLOP/s of those in bf16 that are summed in fp32.
    ``fp32``: TFLOP/s without TF32, which this package does not use. ``fp64_share``: what part of ``fp32`` double
    precision gets. ``bandwidth``: GB/s of its memory. ``shown``: GiB that CUDA shows of it. ``devices``: what
    `torch.cuda.get_device_name` calls the card.
    """

    name: str
    int8: float
    bf16: float
    fp32: float
    fp64_share: float
    bandwidth: float
    shown: float
    devices: tuple[str, ...]

    @property
    def memory_bytes(self) -> int:
        """Return the bytes that CUDA shows of the card's memory."""
        return int(self.shown * _GIB)

    def peak(self, dtype: torch.dtype) -> float:
        """Return the FLOP/s of products of matrices in ``dtype``: int8, bf16, fp32 or fp64."""
        rates = {
            torch.int8: self.int8,
            torch.bfloat16: self.bf16,
            torch.float32: self.fp32,
            torch.float64: self.fp32 * self.fp64_share,
        }
        return rates[dtype] * 1e12


_HALF = 1 / 2
_SIXTY_FOURTH = 1 / 64

# Rates of bf16 and bandwidths are those of nanochat's table (nanochat/common.py) where it has the card, which are those
# of NVIDIA's data sheets. A GeForce does 2,048 operations a clock and multiprocessor in int8, 512 in bf16 and 256 in
# fp32 (NVIDIA's white papers on GA102 and Ada, appendix A): with the multiprocessors and the boost clock of its
# specifications,
#
#     3060 28 × 1.777 GHz   3090 82 × 1.695   4060 Ti 34 × 2.535   4070 Ti SUPER 66 × 2.61   4080 76 × 2.505
#     4090 128 × 2.52       5090 170 × 2.407
#
# give what is here. All others, int8 and fp32, are of the data sheets of A100, L4, L40S, H100, H200 and HGX B200,
# without sparsity. What CUDA shows is from messages of torch's allocator: 3090 GaoLii/DSP issue 10, 4090
# ali-vilab/VGen issue 104, 4080 qingze-bai/VSmTrans issue 3, L40 QwenLM/Qwen3-VL issue 2097, H200
# docs/benchmarks/gpu.md; of the others from logs in public repositories, of which the least is taken. ECC and drivers
# change it by 0.2 GiB.
CARDS = (
    Card("3060", 102, 25.5, 12.7, _SIXTY_FOURTH, 360, 11.76, ("NVIDIA GeForce RTX 3060",)),
    Card("3090", 284, 71, 35.6, _SIXTY_FOURTH, 936, 23.69, ("NVIDIA GeForce RTX 3090",)),
    Card("4060ti-16gb", 176.4, 44.1, 22.1, _SIXTY_FOURTH, 288, 15.70, ("NVIDIA GeForce RTX 4060 Ti",)),
    Card("4070ti-super", 352.8, 88.2, 44.1, _SIXTY_FOURTH, 672, 15.70, ("NVIDIA GeForce RTX 4070 Ti SUPER",)),
    Card("4080", 390, 97.5, 48.7, _SIXTY_FOURTH, 716.8, 15.70, ("NVIDIA GeForce RTX 4080",)),
    Card("4090", 660.8, 165.2, 82.6, _SIXTY_FOURTH, 1008, 23.64, ("NVIDIA GeForce RTX 4090",)),
    Card("5090", 838, 209.5, 104.8, _SIXTY_FOURTH, 1790, 31.36, ("NVIDIA GeForce RTX 5090",)),
    Card("l4", 242, 121, 30.3, _SIXTY_FOURTH, 300, 22.03, ("NVIDIA L4",)),
    Card("l40s", 724, 362, 91.6, _SIXTY_FOURTH, 864, 44.39, ("NVIDIA L40S",)),
    Card("a100-40gb", 624, 312, 19.5, _HALF, 1555, 39.38, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
    Card("a100", 624, 312, 19.5, _HALF, 2000, 79.14, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
    Card("h100", 1978, 989, 66.9, _HALF, 3350, 79.10, ("NVIDIA H100 80GB HBM3",)),
    Card("h100-pcie", 1512, 756, 51.2, _HALF, 2000, 79.10, ("NVIDIA H100 PCIe",)),
    Card("h100-nvl", 1670, 835, 60, _HALF, 3900, 93.00, ("NVIDIA H100 NVL",)),
    Card("h200", 1978, 989, 66.9, _HALF, 4800, 139.80, ("NVIDIA H200",)),
    Card("b200", 4500, 2250, 75, _HALF, 8000, 178.35, ("NVIDIA B200",)),
)


def card_named(name: str) -> Card:
    """Return the card of a short name, such as ``4090``, or of CUDA's name; InputError where the table has none."""
    card = known_card(name)
    if card is None:
        raise InputError(
            f"--time {name}: not in the table of cards, which has {names()}; another one is planned for by "
            "--device cuda --memory-budget SIZE, such as 12GB, without a time"
        )
    return card


def card_here(device: str) -> Card:
    """Return the card that ``device``, a value of ``--device``, means here; InputError where the table has it not."""
    if not torch.cuda.is_available():
        raise InputError(f"--time: this machine has no CUDA devices; name a card: {names()}")
    return card_named(torch.cuda.get_device_name(torch.device(device)))


def known_card(name: str) -> Card | None:
    """Return the card of a short name or of CUDA's name, in any letter case; None where the table has none.

    The whole name counts: an ``RTX 4090 Laptop GPU`` is no ``RTX 4090``.
    """
    plain = _plain(name)
    for card in CARDS:
        if plain in [_plain(known) for known in (card.name, *card.devices)]:
            return card
    return None


def names() -> str:
    """Return the short names of all cards, as an error lists them."""
    return ", ".join(card.name for card in CARDS)


def _plain(name: str) -> str:
    """Return what tells a card's name from others: without its maker's words, spaces and dashes."""
    plain = name.casefold()
    for part in _NO_PART_OF_A_NAME:
        plain = plain.replace(part, "")
    return plain
