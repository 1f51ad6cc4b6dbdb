"""Secret seeds: what a file makes of them, and what a secret takes from who chooses ports."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest

from dataplane.seeds import PUBLIC, read_seed
from lb import maglev
from tests import reference
from tests.memory_node import MemoryNode
from tests.packets import Address, address, syn
from tests.services import Service
from xdp.errors import ConfigError
from xdp.schema import Protocol

SECRET = "c2b1f0e5d4938271605f4e3d2c1b0a99"
HOSTS = ("web-1", "web-2", "web-3")
CHOSEN = 600  # connections


def written(path: Path, secret: str | bytes = SECRET, mode: int = 0o600) -> Path:
    path.write_bytes(secret if isinstance(secret, bytes) else secret.encode())
    path.chmod(mode)
    return path


def test_without_a_file_the_seed_is_the_public_one():
    assert read_seed(None) is PUBLIC
    assert PUBLIC.number == maglev.DEFAULT_SEED


@pytest.mark.faults(131)
def test_nodes_with_one_secret_have_one_seed_and_others_do_not(tmp_path):
    ours = read_seed(written(tmp_path / "a"))
    assert read_seed(written(tmp_path / "b", f" {SECRET}\r\n", 0o440)) == ours, "whatever an editor has added"
    other = read_seed(written(tmp_path / "c", SECRET[:-1]))
    assert len({seed.number for seed in (ours, other, PUBLIC)}) == 3
    assert len({seed.fingerprint for seed in (ours, other, PUBLIC)}) == 3


def test_a_seed_is_the_same_on_every_machine(tmp_path):
    """Golden values: whoever changes them makes nodes of two versions disagree."""
    seed = read_seed(written(tmp_path / "seed"))
    assert (f"{seed.number:#x}", seed.fingerprint) == ("0xab4158006c58e5ea", "14be37cb")


def test_a_seed_that_is_shown_does_not_say_its_number(tmp_path):
    seed = read_seed(written(tmp_path / "seed"))
    for shown in (repr(seed), str(seed), seed.fingerprint):
        assert not any(form in shown for form in (str(seed.number), f"{seed.number:x}", SECRET))


@pytest.mark.parametrize(
    ("secret", "mode", "problem"),
    [
        ("", 0o600, "0 bytes are no secret; expected 16 at least: `openssl rand -hex 32` makes one"),
        ("\n" * 40, 0o600, "0 bytes are no secret"),
        ("fifteen letters", 0o600, "15 bytes are no secret"),
        (bytes(4097), 0o600, "is longer than 4096 bytes; is it the file with the secret?"),
        (SECRET, 0o644, "everybody may read or write it, so it is no secret; `chmod o= "),
        (SECRET, 0o602, "everybody may read or write it"),
    ],
    ids=["empty", "blank", "short", "long", "readable", "writable"],
)
def test_what_is_no_secret_is_refused_with_the_cure(tmp_path, secret, mode, problem):
    path = written(tmp_path / "seed", secret, mode)
    with pytest.raises(ConfigError) as caught:
        read_seed(path)
    assert str(caught.value).startswith(f"{path}: {problem}")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(("make", "problem"), [(bool, "no such file; check the path"), (Path.mkdir, "cannot be read")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, make, problem):
    make(tmp_path / "seed")
    with pytest.raises(ConfigError, match=f"seed: .*{problem}"):
        read_seed(tmp_path / "seed")


# Who chooses ports.


def node_of(folder: Path, family: int, secret: str | None, *services: Service) -> MemoryNode:
    """Return a node that serves, with a secret or without."""
    folder.mkdir()
    flags = {} if secret is None else {"seed-file": str(written(folder / "seed", secret))}
    node = MemoryNode(folder, flags, family)
    node.apply(*services)
    return node


def worked_out(service: Service, client: Address, seed: int, family: int) -> Address:
    """Return the endpoint that a client gets: worked out from what everybody knows who knows the seed."""
    model = reference.Service(tuple(map(address, service.endpoints)))
    protocol = Protocol.TCP | (Protocol.IPV6 if family == 6 else 0)
    return model.select(reference.Key(client, service.at, protocol), seed, 0)


def picked(service: Service, client: int, host: Address, family: int) -> list[Address]:
    """Return clients of one address whose ports all lead to one endpoint by the public seed."""
    every = ((client, port) for port in range(1024, 65536))
    leading = (each for each in every if worked_out(service, each, maglev.DEFAULT_SEED, family) == host)
    return list(itertools.islice(leading, CHOSEN))


def given(node: MemoryNode, service: Service, clients: list[Address]) -> list[str]:
    """Return which host each of these clients is given."""
    return [node.send(syn(client, service.at)).only[0] for client in clients]


def is_as_chance_would(counts: Counter[str]) -> bool:
    """Whether shares are equal within five standard deviations: that fails by chance once in a million times."""
    total, share = counts.total(), 1 / len(HOSTS)
    margin = 5 * math.sqrt(total * share * (1 - share))
    return all(abs(counts[host] - total * share) < margin for host in HOSTS)


@pytest.mark.faults(83)
@pytest.mark.parametrize("family", [4, 6])
def test_F083_ports_that_are_picked_for_one_endpoint_spread_where_the_seed_is_secret(tmp_path, family):
    plan = MemoryNode(tmp_path, family=family)
    service = Service("web", plan.vip(1, 80), tuple(plan.endpoint(host) for host in HOSTS))
    clients = picked(service, plan.client()[0], plan.at("web-2", 8080), family)

    public = node_of(tmp_path / "public", family, None, service)
    assert Counter(given(public, service, clients)) == {"web-2": CHOSEN}, "the fault: who knows the seed chooses"

    secret = node_of(tmp_path / "secret", family, SECRET, service)
    chosen = given(secret, service, clients)
    assert is_as_chance_would(Counter(chosen)), Counter(chosen)
    seed = read_seed(tmp_path / "secret" / "seed").number
    assert chosen == [secret.host_of(worked_out(service, client, seed, family)) for client in clients]

    # A node that has its own flow table, and heard of the endpoints in another order.
    shuffled = service.with_endpoints(*service.endpoints[::-1])
    assert given(node_of(tmp_path / "second", family, SECRET, shuffled), service, clients) == chosen
    assert given(node_of(tmp_path / "other", family, SECRET[::-1], service), service, clients) != chosen


@pytest.mark.parametrize("family", [4, 6])
def test_S11_a_client_that_keeps_its_endpoints_is_given_them_by_the_secret_too(tmp_path, family):
    plan = MemoryNode(tmp_path, family=family)
    endpoints, spec = tuple(plan.endpoint(host) for host in HOSTS), {"sessionAffinity": "ClientIP"}
    services = [Service(f"web-{number}", plan.vip(number, 80), endpoints, spec=spec) for number in range(1, 31)]

    def chosen(name: str, secret: str | None) -> list[str]:
        node = node_of(tmp_path / name, family, secret, *services)
        return [node.send(syn(node.client(), service.at)).only[0] for service in services]

    assert chosen("one", SECRET) == chosen("same", SECRET)
    assert chosen("public", None) != chosen("again", SECRET)


def test_the_status_tells_the_fingerprint_and_never_the_secret(tmp_path):
    service = Service("web", "10.96.0.1:80")
    assert node_of(tmp_path / "public", 4, None, service).status()["seed"] == "public"
    status = node_of(tmp_path / "secret", 4, SECRET, service).status()
    assert status["seed"] == read_seed(tmp_path / "secret" / "seed").fingerprint
    assert SECRET not in str(status)
