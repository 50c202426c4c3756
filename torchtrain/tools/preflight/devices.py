"""Figures of devices and of the links between them, which predictions of a run are made from.

Peaks are those of `torchtrain.metrics`. All other figures have their source beside them:

- memory: what PyTorch calls the device's total capacity, as its messages have it
- products: what a large bf16 matrix product reaches at best, measured by mamf-finder
  (https://github.com/stas00/ml-engineering/tree/master/compute/accelerator, table of 2025)
- bandwidths: the makers' data sheets; a link's is of one direction
"""

from dataclasses import dataclass, replace

from torchtrain.errors import UserError
from torchtrain.metrics import PEAK_BF16_FLOPS
from torchtrain.utils import nearest

GB = 1e9
BITS = 8

NETWORK_GBIT_PER_S = 400.0
"""Of each device between nodes, in one direction: one port of NDR InfiniBand, or of 400 Gb/s
Ethernet, per GPU, as in DGX H100 and in Meta's clusters (arXiv:2407.21783, section 3.3.1)."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one device can do, and how it is connected."""

    name: str
    """As `--device` gives it."""
    product: str
    """What it is, in its maker's words."""
    memory_gib: float | None
    """Usable memory in GiB; None: what the machine has, which no table knows."""
    peak_flops: float
    """Dense bf16 peak in FLOP/s, which MFU is a share of."""
    product_flops: float
    """What large bf16 matrix products reach at best, in FLOP/s."""
    float8_gain: float = 1.0
    """The speed of products in float8 as a multiple of that in bf16; 1: none, or not measured."""
    fp32_share: float = 1 / 16
    """Of the speed of bf16 products, fp32 ones, which do not use TF32: 67 of 989 TFLOP/s on an H100
    and 19.5 of 312 on an A100, by their data sheets."""
    attention_share: float
    """What PyTorch's attention kernels reach, as a share of `product_flops`."""
    memory_bandwidth: float
    """Bytes per second to and from its memory."""
    node_bandwidth: float
    """Bytes per second to the others of its node, in one direction."""
    host_bandwidth: float
    """Bytes per second to the memory of its host, in one direction."""
    network_bandwidth: float = NETWORK_GBIT_PER_S / BITS * GB
    """Bytes per second to other nodes, in one direction."""
    devices_per_node: int = 8

    def with_network(self, gbit_per_s: float | None, devices_per_node: int | None) -> "Device":
        """Return the device in a cluster of another kind; None leaves the table's figure."""
        device = self
        if gbit_per_s is not None:
            device = replace(device, network_bandwidth=gbit_per_s / BITS * GB)
        if devices_per_node is not None:
            device = replace(device, devices_per_node=devices_per_node)
        return device


PEAKS = dict(PEAK_BF16_FLOPS)

# PCI Express, 16 lanes: 32 GB/s in one direction in the fourth generation, twice that in the fifth.
PCIE_4 = 32 * GB
PCIE_5 = 64 * GB

# PyTorch's flash kernels are those of FlashAttention-2: 35 % of an H100's peak (arXiv:2407.08608,
# abstract), 50 to 73 % of an A100's (arXiv:2307.08691, abstract). Here as shares of what products
# reach; other devices are given those of the kind that is nearest.
ATTENTION_HOPPER = 0.44
ATTENTION_AMPERE = 0.7

H100 = Device(
    name="h100",
    product="NVIDIA H100 SXM, 80 GB",
    memory_gib=79.1,
    peak_flops=PEAKS["H100"],
    product_flops=794.5e12,  # measured
    float8_gain=1402.6 / 794.5,  # measured
    attention_share=ATTENTION_HOPPER,
    memory_bandwidth=3350 * GB,  # 3.35 TB/s: nvidia.com/en-us/data-center/h100
    node_bandwidth=450 * GB,  # NVLink: 900 GB/s both ways, the same page
    host_bandwidth=PCIE_5,
)
A100 = Device(
    name="a100-80",
    product="NVIDIA A100 SXM, 80 GB",
    memory_gib=79.1,
    peak_flops=PEAKS["A100"],
    product_flops=271.2e12,  # measured
    attention_share=ATTENTION_AMPERE,
    memory_bandwidth=2039 * GB,  # nvidia.com/en-us/data-center/a100
    node_bandwidth=300 * GB,  # NVLink: 600 GB/s both ways, the same page
    host_bandwidth=PCIE_4,
    network_bandwidth=200 / BITS * GB,  # HDR InfiniBand, one port per GPU: DGX A100's data sheet
)
TABLE = (
    H100,
    # The H100 of torchtitan's tables: 96 GB of HBM2e at 2.4 TB/s, limited to 500 W, "the actual
    # peak is between SXM and NVL" (its benchmarks/llama3_h100_202412_torchtitan.md). The NVL's peak
    # is taken, and of it the share that was measured on SXM; MFU stays a share of SXM's.
    replace(
        H100,
        name="h100-96",
        product="NVIDIA H100 SXM, 96 GB of HBM2e, 500 W",
        memory_gib=95.0,
        product_flops=H100.product_flops * PEAKS["H100 NVL"] / PEAKS["H100"],
        memory_bandwidth=2400 * GB,
    ),
    # The same chip with other memory: 4.8 TB/s, nvidia.com/en-us/data-center/h200
    replace(
        H100,
        name="h200",
        product="NVIDIA H200 SXM, 141 GB",
        memory_gib=139.8,
        peak_flops=PEAKS["H200"],
        memory_bandwidth=4800 * GB,
    ),
    replace(
        A100,
        name="a100-40",
        product="NVIDIA A100 SXM, 40 GB",
        memory_gib=39.4,
        memory_bandwidth=1555 * GB,
    ),
    A100,
    Device(
        name="b200",
        product="NVIDIA B200 SXM (HGX), 180 GB",
        memory_gib=178.3,
        peak_flops=PEAKS["B200"],
        product_flops=PEAKS["B200"] * 0.77,  # not measured by mamf-finder: a little under H100's
        attention_share=ATTENTION_HOPPER,
        memory_bandwidth=7750 * GB,  # 62 TB/s of 8: nvidia.com/en-us/data-center/hgx
        node_bandwidth=900 * GB,  # NVLink: 1.8 TB/s both ways, the same page
        host_bandwidth=PCIE_5,
    ),
    Device(
        name="l40s",
        product="NVIDIA L40S, 48 GB",
        memory_gib=44.3,
        peak_flops=PEAKS["L40S"],
        product_flops=PEAKS["L40S"] * 0.7,  # not measured by mamf-finder: 350 W limit its clock
        attention_share=ATTENTION_AMPERE,
        memory_bandwidth=864 * GB,  # nvidia.com/en-us/data-center/l40s
        node_bandwidth=PCIE_4,  # it has no NVLink
        host_bandwidth=PCIE_4,
        network_bandwidth=200 / BITS * GB,  # what such servers commonly have; no data sheet says
    ),
    Device(
        name="mi300x",
        product="AMD Instinct MI300X, 192 GB",
        memory_gib=191.6,
        peak_flops=PEAKS["MI300X"],
        product_flops=668.4e12,  # measured
        attention_share=ATTENTION_HOPPER,
        memory_bandwidth=5300 * GB,  # amd.com/en/products/accelerators/instinct/mi300/mi300x.html
        node_bandwidth=448 * GB,  # seven Infinity Fabric links of 128 GB/s both ways, the same page
        host_bandwidth=PCIE_5,
    ),
    # One rank with two threads on the machine of docs/performance.md: 0.12 TFLOP/s are 32 % of what
    # products reach there. Its memory and links are assumed, not measured.
    Device(
        name="cpu",
        product="a CPU rank with two threads",
        memory_gib=None,
        peak_flops=0.375e12,
        product_flops=0.375e12,
        fp32_share=1.0,  # bf16 is emulated there
        attention_share=0.5,
        memory_bandwidth=10 * GB,
        node_bandwidth=1 * GB,
        host_bandwidth=10 * GB,
        network_bandwidth=10 / BITS * GB,
        devices_per_node=2,
    ),
)
DEVICES = {device.name: device for device in TABLE}


def find_device(name: str) -> Device:
    """Return the figures of a device by its name, in whatever case.

    Raises:
        UserError: no such device; names those that there are.
    """
    device = DEVICES.get(name.lower())
    if device is None:
        close = nearest(name.lower(), DEVICES)
        hint = f". Did you mean {close}?" if close else ""
        raise UserError(f"--device {name}: unknown; allowed: {', '.join(DEVICES)}{hint}")
    return device
