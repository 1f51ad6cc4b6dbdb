"""Settings: from flags and files to one frozen thing, and the places that follow from a name."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane import config
from dataplane.settings import OPTIONS, PortRange, Settings, VlanRange, interface_of, merge
from xdp.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path):
    """A function that writes a configuration file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "turnout.yaml"
        path.write_text(text)
        return str(path)

    return write


def problems(path: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]


def test_every_flag_can_stand_in_a_file(file):
    path = file("""
        name: edge
        file: [web.yaml, /etc/more, '-']
        interface: eth0
        engine: afxdp
        xdp-mode: generic
        capacity: 1000
        announce: arp
        ping: drop
        on-exit: detach
        node-name: worker-1
        zone: no
        allow-external-ips: [203.0.113.0/24, '2001:db8::/32']
        nodeport-addresses: 192.0.2.0/24
        masquerade: none
        cluster-cidr: [10.244.0.0/16, 10.245.0.0/16]
        snat-ports: 20000-20999
        snat-addresses: [192.0.2.7, '2001:db8::7']
        vlan: [100, 200-299, all]
        socket-cgroup: /sys/fs/cgroup
        seed-file: secret
        metrics: '[::1]:9100'
        log-format: json
    """)
    assert set(config.load(path)) == {option.field for option in OPTIONS.values()}
    settings = merge({}, config.load(path))
    assert settings == Settings(
        name="edge",
        files=(str(Path(path).parent / "web.yaml"), "/etc/more", "-"),
        interfaces=("eth0",),
        engine="afxdp",
        xdp_mode="generic",
        capacity=1000,
        announce="arp",
        ping="drop",
        on_exit="detach",
        node_name="worker-1",
        zone="no",
        allow_external_ips=(ip_network("203.0.113.0/24"), ip_network("2001:db8::/32")),
        nodeport_addresses=(ip_network("192.0.2.0/24"),),
        masquerade="none",
        cluster_cidr=(ip_network("10.244.0.0/16"), ip_network("10.245.0.0/16")),
        snat_ports=PortRange(20000, 20999),
        snat_addresses=(ip_address("192.0.2.7"), ip_address("2001:db8::7")),
        vlans=(VlanRange(100, 100), VlanRange(200, 299), VlanRange(0, 4094)),
        socket_cgroup=Path("/sys/fs/cgroup"),
        seed_file=Path(path).parent / "secret",
        metrics=("::1", 9100),
        log_format="json",
    )


def test_a_flag_wins_over_the_file_and_what_is_not_given_has_a_default(file):
    path = file("capacity: 1000\nengine: raw\n")
    settings = merge({"capacity": 2000, "engine": None, "files": (), "interfaces": ("a", "b", "a")}, config.load(path))
    assert (settings.capacity, settings.engine, settings.name, settings.interfaces) == (2000, "raw", "node", ("a", "b"))


def test_all_problems_of_a_file_are_told_at_once_with_their_lines(file):
    path = file(
        "capacity: 0\nenginee: xdp\nengine: xpd\ninterface: [eth0, 'a b']\nmetrics: 127.0.0.1\n"
        "allow-external-ips:\n- 10.0.0.1/8\non-exit: true\nzone:\n  a: b\nzone: c\n"
    )
    assert problems(path) == [
        "1: capacity: '0' is not a number of connections; expected 1 to 500000000",
        '2: enginee: unknown setting; did you mean "engine"?',
        "3: engine: 'xpd' is not one of auto, xdp, afxdp, raw; did you mean \"xdp\"?",
        "4: interface: 'a b' is no name of an interface; see `ip -br link`",
        "5: metrics: '127.0.0.1' is not ADDR:PORT; expected an address like 127.0.0.1:17420 or [::1]:17420",
        "7: allow-external-ips: 10.0.0.1/8 has host bits set; expected a network like 203.0.113.0/24",
        "8: on-exit: true is no value; expected [keep|detach]",
        "11: zone: comes twice; remove one",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("capacity: [\n", "2: is not YAML"),
        ("- a\n- b\n", "1: "),
        ("capacity: 1\n---\ncapacity: 2\n", "3: a second document"),
        ("a\tb: \x01", "1: "),
        ("capacity: 1e6", "1: capacity: 1000000.0 is no value"),
        ("name: a/b", "1: name: 'a/b' is no name"),
        ("metrics: 1.2.3.4:0", "1: metrics: '1.2.3.4:0' is not ADDR:PORT"),
        ("metrics: ::1:80", "1: metrics: "),
        ("snat-ports: 20999-20000", "1: snat-ports: '20999-20000' is no range of ports; expected one like 61000-65535"),
        ("snat-ports: 80-90", "1: snat-ports: '80-90' is no range"),
        ("snat-addresses: 10.0.0.300", "1: snat-addresses: '10.0.0.300' is not an IP address"),
        ("snat-addresses: 224.0.0.1", "1: snat-addresses: 224.0.0.1: nothing that is sent there comes back"),
        (
            "socket-cgroup: sys/fs",
            "1: socket-cgroup: 'sys/fs' is not the whole path of a folder; expected one like /sys",
        ),
        ("cluster-cidr: 'fd00::1/8'", "1: cluster-cidr: fd00::1/8 has host bits set"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line(file, text, problem):
    assert problems(file(text))[0].startswith(problem)


@pytest.mark.parametrize(("make", "problem"), [(bool, "no such file"), (Path.mkdir, "cannot be read")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, make, problem):
    make(tmp_path / "here")
    with pytest.raises(ConfigError, match=f"here: {problem}"):
        config.load(str(tmp_path / "here"))


def test_an_empty_file_sets_nothing(file):
    assert config.load(file("# nothing yet\n")) == {}


@given(st.text(max_size=80))
def test_no_text_makes_the_reader_fail_otherwise(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "turnout.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    try:
        config.load(str(path))
    except ConfigError as error:
        assert str(path) in str(error)  # noqa: PT017 - most texts are an error, some are not


def test_places_follow_from_the_name_and_the_run_folder(monkeypatch):
    monkeypatch.setenv("TURNOUT_RUN", "/run/elsewhere")
    settings = merge({"name": "edge"}, {})
    assert settings.socket_path == Path("/run/elsewhere/edge.sock")
    assert settings.lock_path == Path("/run/elsewhere/edge.lock")
    assert settings.pins == Path("/run/elsewhere/bpf/edge")
    monkeypatch.delenv("TURNOUT_RUN")
    assert merge({}, {}).bpffs == Path("/run/turnout/bpf")


@pytest.mark.parametrize("interface", ["eth0", "eth0.100", "a%2eb", "%", "..x"])
def test_the_pin_of_a_link_has_no_dots_and_names_its_interface(interface):
    pin = merge({}, {}).link_pin(interface)
    assert "." not in pin.name
    assert interface_of(pin) == interface


def test_pinned_links_are_found_without_knowing_their_interfaces(tmp_path):
    settings = Settings("edge", (), (), run_folder=tmp_path)
    assert settings.link_pins() == []
    settings.pins.mkdir(parents=True)
    for pin in (settings.link_pin("eth1.5"), settings.link_pin("eth0"), settings.pins / "flows"):
        pin.touch()
    assert [interface_of(pin) for pin in settings.link_pins()] == ["eth0", "eth1.5"]


def test_pins_of_hooks_are_not_those_of_links(tmp_path):
    settings = Settings("edge", (), (), run_folder=tmp_path)
    assert settings.hook_pins() == []
    settings.pins.mkdir(parents=True)
    for pin in (settings.hook_pin("connect4"), settings.link_pin("hook-0"), settings.egress_pin("eth0")):
        pin.touch()
    assert settings.hook_pins() == [settings.pins / "hook-connect4"]
    assert settings.link_pins() == [settings.link_pin("hook-0")]
