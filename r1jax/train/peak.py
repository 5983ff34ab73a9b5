"""The highest rate of dense products that hardware is built for, by which utilisation is measured."""

import re

RATES: tuple[tuple[str, float, float, float | None], ...] = (
    # Dense TFLOP/s in bf16 (fp16 alike), TF32, fp8, of NVIDIA's datasheets, whose figures with sparsity are halved.
    # H100 Tensor Core GPU datasheet: SXM5, PCIe, NVL; H200 and GH200 Grace Hopper Superchip datasheets say the same.
    (r"NVIDIA H100( \d+GB HBM\d\w*)?", 989.4, 494.7, 1978.9),
    (r"NVIDIA H100 PCIe", 756.0, 378.0, 1513.0),
    (r"NVIDIA H100 NVL", 835.5, 417.5, 1670.5),
    (r"NVIDIA H200", 989.4, 494.7, 1978.9),
    (r"NVIDIA H200 NVL", 835.5, 417.5, 1670.5),
    (r"NVIDIA GH200 \w+", 989.4, 494.7, 1978.9),
    # A100 Tensor Core GPU datasheet: SXM4 and PCIe alike; the chip has no fp8.
    (r"NVIDIA A100[- ](SXM4-\d+GB|PCIE-\d+GB|\d+GB PCIe)", 312.0, 156.0, None),
    # HGX B200 datasheet, an eighth of the board.
    (r"NVIDIA B200", 2250.0, 1125.0, 4500.0),
    # L4 and L40S datasheets.
    (r"NVIDIA L4", 121.0, 60.0, 242.5),
    (r"NVIDIA L40S", 362.05, 183.0, 733.0),
)
COLUMN = {"bfloat16": 1, "float16": 1, "float32": 2, "float8": 3}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Looks up the peak of a device.

    Args:
      device_kind: As JAX names it; a slice of a device (MIG) has another name, and is not known.
      dtype: Of the operands: bfloat16, float16, float32 (which JAX multiplies as TF32 on these devices) or float8.

    Returns:
      Dense FLOP/s, or None where they are not known.
    """
    for row in RATES:
        rate = row[COLUMN[dtype]]
        if re.fullmatch(row[0], device_kind) and isinstance(rate, float):
            return rate * 1e12
    return None
