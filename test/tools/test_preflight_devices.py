"""The table of devices: its figures are of the right kind and order, and its names are found."""

import pytest

from torchtrain.errors import UserError
from torchtrain.metrics import PEAK_BF16_FLOPS
from torchtrain.tools.preflight.devices import DEVICES, TABLE, find_device

GPUS = [device for device in TABLE if device.name != "cpu"]


def test_the_issue_s_devices_are_in_the_table():
    expected = {"h100", "h200", "a100-40", "a100-80", "b200", "l40s", "mi300x", "cpu"}
    assert expected <= DEVICES.keys()
    assert len(DEVICES) == len(TABLE)


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
def test_figures_are_in_the_order_that_hardware_has(device):
    assert device.peak_flops in dict(PEAK_BF16_FLOPS).values()
    assert 0.5 * device.peak_flops < device.product_flops < 0.9 * device.peak_flops
    assert 0.3 < device.attention_share < 0.8
    # Memory is faster than the node's links, those than the host's and the network's.
    assert device.memory_bandwidth > 2 * device.node_bandwidth
    assert device.node_bandwidth >= device.host_bandwidth > device.network_bandwidth
    # A gigabyte of the data sheet is at most a GiB of PyTorch's, and most of it is usable.
    sold = float(device.product.partition(" GB")[0].rpartition(" ")[2])
    assert 0.9 * sold < device.memory_gib < sold


def test_a_cluster_of_another_kind():
    device = find_device("H100").with_network(100, 4)
    assert device.network_bandwidth == 12.5e9
    assert device.devices_per_node == 4
    assert find_device("h100").with_network(None, None) == find_device("h100")


def test_an_unknown_device_is_told_which_there_are():
    with pytest.raises(UserError, match="Did you mean h100") as raised:
        find_device("h10")
    assert ", ".join(DEVICES) in str(raised.value)
