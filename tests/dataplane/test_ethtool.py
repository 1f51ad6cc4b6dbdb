"""What ethtool says of interfaces, and what a driver lets us switch."""

from __future__ import annotations

import subprocess

import pytest

from dataplane.ethtool import has_feature, has_gro, has_lro, set_feature, set_gro
from perf import echo

pytestmark = pytest.mark.root


@pytest.fixture
def network():
    with echo.own_network():
        echo.veth_pair("a0", "a1")
        yield


def test_a_veth_merges_nothing(network):
    assert not has_lro("a1")
    assert not has_lro("nothing")


@pytest.mark.parametrize(
    ("feature", "shown"), [("rx-vlan-hw-parse", "rx-vlan-offload"), ("rx-vlan-stag-hw-parse", "rx-vlan-stag-hw-parse")]
)
def test_features_are_what_ethtool_shows(network, feature, shown):
    """One in the kernel's first word of them, and one beyond."""
    assert has_feature("a1", feature)
    before = features_shown()
    for is_on in (False, True):
        assert set_feature("a1", feature, is_on=is_on)
        assert has_feature("a1", feature) == is_on
        assert features_shown() == before | {shown: "on" if is_on else "off"}
    assert not has_feature("nothing", feature)
    assert not set_feature("nothing", feature, is_on=True)


def features_shown() -> dict[str, str]:
    command = ["ethtool", "-k", "a1"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[1:]
    return {name.strip(): value for name, _, value in (line.partition(": ") for line in lines)}


def test_a_feature_that_is_fixed_or_unknown_is_not_switched(network):
    assert has_feature("lo", "loopback")
    assert not set_feature("lo", "loopback", is_on=False)
    assert has_feature("lo", "loopback")
    assert not has_feature("a1", "rx-vlan-filter")
    assert not set_feature("a1", "rx-vlan-filter", is_on=True)
    assert not has_feature("a1", "no-such-feature")
    assert not set_feature("a1", "no-such-feature", is_on=False)


def test_gro_that_comes_from_the_lower_device_is_not_switched(network):
    """The ioctl of a macvlan succeeds, and changes what is wished for only."""
    subprocess.run(["ip", "link", "add", "virtual0", "link", "a1", "type", "macvlan"], check=True)
    assert set_gro("a1", is_on=True)
    assert has_gro("virtual0")
    assert not set_gro("virtual0", is_on=False)
    assert has_gro("virtual0")
    assert set_gro("a1", is_on=False)
    assert not has_gro("virtual0")
