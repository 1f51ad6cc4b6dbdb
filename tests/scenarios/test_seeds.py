"""A daemon that is started again with another seed, between real clients and servers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from dataplane.seeds import read_seed
from lb import maglev
from tests import reference
from tests.packets import address
from tests.scenarios.site import EACH_PATH, Site, undisturbed
from tests.services import Service
from xdp.addresses import number_of
from xdp.schema import Protocol

pytestmark = [
    pytest.mark.root,
    pytest.mark.bpf,
]
SECRET, FLOWS = "what all nodes share", 30


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "seed"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    return path


@pytest.fixture(autouse=True)
def _services(site: Site) -> Iterator[None]:
    site.serve()
    yield
    site.daemon.restart()
    site.serve()
    site.check_accounts()


def with_admission_by(who: str, service: Service) -> Service:
    return replace(service, annotations={"turnout.dev/admit": who})


def expected(site: Site, service: Service, port: int, seed: int) -> str:
    """Return which endpoint the model gives a flow of the client's port."""
    model = reference.Service(tuple(map(address, service.endpoints)))
    protocol = Protocol.UDP | (Protocol.IPV6 if site.family == 6 else 0)
    key = reference.Key((number_of(ip_address(site.ip("client"))), port), service.at, protocol)
    host, _ = model.select(key, seed, 0)
    return next(name for name in ("web-1", "web-2", "web-3") if number_of(ip_address(site.ip(name))) == host)


def assert_chosen_by(site: Site, service: Service, seed: int) -> None:
    """Assert that new flows go where this seed leads."""
    for _ in range(FLOWS):
        with site.asking() as ask:
            assert ask() == expected(site, service, ask.port, seed)


@pytest.mark.faults(83, 131)
@pytest.mark.parametrize("site", EACH_PATH, indirect=True, scope="session")
@pytest.mark.parametrize("admit", ["userspace", "xdp"])
def test_new_flows_go_where_the_seed_says_whoever_admits(site, secret, admit):
    dns = with_admission_by(admit, site.dns)
    site.daemon.apply(site.web, dns)
    assert_chosen_by(site, dns, maglev.DEFAULT_SEED)
    site.daemon.restart("--seed-file", str(secret))
    assert_chosen_by(site, dns, read_seed(secret).number)
    assert site.daemon.ask("status")["seed"] == read_seed(secret).fingerprint
    assert SECRET not in site.daemon.said()


@pytest.mark.faults(131)
@pytest.mark.parametrize("site", ["xdp", "xdp-6"], indirect=True, scope="session")
def test_another_seed_moves_no_connection(site, secret):
    dns = with_admission_by("xdp", site.dns)
    site.daemon.apply(site.web, dns)
    with undisturbed(site):
        before = site.endpoints_of_flows(active=True)
        site.daemon.restart("--seed-file", str(secret))
        assert_chosen_by(site, dns, read_seed(secret).number)
        after = site.endpoints_of_flows()
        assert {key: after.get(key) for key in before} == before
