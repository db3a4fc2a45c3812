"""``Frozen`` compared with a frozen dataclass of the same fields; our data; bindings are checked when made."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest

from rankspawn import AffinityMode, Binding, BindingReport, MemoryPolicy, NumaOptions
from rankspawn._binding import MEMORY_MODES
from rankspawn._frozen import Frozen
from rankspawn._place.plan import Placed
from rankspawn._place.topology import Core
from rankspawn._place.visible import Device
from rankspawn._start import engine as _engine
from rankspawn._start.outcome import RefusedStep


class Place(Frozen):
    """Two fields that have defaults, one of them of the class's own type."""

    name: str
    cpus: frozenset[int] = frozenset()
    next: Place | None = None

    @property
    def count(self) -> int:
        return len(self.cpus)


class Far(Place):
    """It has its own fields after those of its base."""

    distance: int = 20


@dataclasses.dataclass(frozen=True)
class PlaceReference:
    name: str
    cpus: frozenset[int] = frozenset()
    next: PlaceReference | None = None

    @property
    def count(self) -> int:
        return len(self.cpus)


@dataclasses.dataclass(frozen=True)
class FarReference(PlaceReference):
    distance: int = 20


BOTH = pytest.mark.parametrize(("place", "far"), [(Place, Far), (PlaceReference, FarReference)])


@BOTH
def test_fields_and_defaults(place: Any, far: Any) -> None:
    one = place("a", next=place("b", frozenset({1})))
    assert (one.name, one.cpus, one.next.cpus, one.next.count) == ("a", frozenset(), {1}, 1)
    assert vars(far("a", distance=3)) == {"name": "a", "cpus": frozenset(), "next": None, "distance": 3}
    assert far.__match_args__ == ("name", "cpus", "next", "distance")
    match far("a", distance=3):
        case place(name, cpus=cpus):
            assert (name, cpus) == ("a", frozenset())
        case _:
            raise AssertionError


@BOTH
@pytest.mark.parametrize(
    ("values", "named"), [((), {}), ((), {"cpus": 1}), (("a",), {"name": "a"}), (("a",), {"nmae": 1}), (("a",) * 4, {})]
)
def test_wrong_arguments(place: Any, far: Any, values: tuple[Any, ...], named: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        place(*values, **named)


@BOTH
def test_equal_and_hashed_by_fields_and_class(place: Any, far: Any) -> None:
    assert place("a", {1}) == place("a", {1}) != place("a", {2})
    assert place("a") != far("a") and place("a") != ("a", frozenset(), None)
    assert len({place("a"), place("a"), place("b"), far("a")}) == 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(place("a", {1}))


@BOTH
def test_frozen(place: Any, far: Any) -> None:
    one = far("a")
    for name in ("name", "distance", "unknown"):
        with pytest.raises(AttributeError):
            setattr(one, name, 1)
        with pytest.raises(AttributeError):
            delattr(one, name)
    assert one == far("a")


@BOTH
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, *(lambda one, n=n: pickle.loads(pickle.dumps(one, n)) for n in range(6))]
)
def test_copied_and_pickled(place: Any, far: Any, copied: Callable[[Any], Any]) -> None:
    one = far("a", frozenset({1}), place("b"))
    assert copied(one) == one and type(copied(one)) is far


def test_shown_as_a_dataclass_is() -> None:
    assert repr(Far("a", next=Place("b"))) == repr(FarReference("a", next=PlaceReference("b"))).replace("Reference", "")


def test_changed_copies() -> None:
    one = Place("a", frozenset({1}))
    assert one.replace(name="b") == Place("b", frozenset({1}))
    with pytest.raises(
        TypeError, match="takes name, cpus, next, each once; given: 0 by position, name, cpus, next, no"
    ):
        one.replace(no=1)
    if sys.version_info >= (3, 13):
        assert copy.replace(one, cpus=frozenset()) == Place("a")


POLICY = MemoryPolicy("interleave", [1, 0])
BINDING = Binding(range(3), POLICY, False)


@pytest.mark.parametrize(
    ("one", "shown"),
    [
        (POLICY, "MemoryPolicy(mode='interleave', nodes=frozenset({0, 1}))"),
        (BINDING, f"Binding(cpus=frozenset({{0, 1, 2}}), memory={POLICY!r}, required=False)"),
        (RefusedStep("set_mempolicy", 1), "RefusedStep(step='set_mempolicy', errno=1)"),
        (BindingReport(None, (), 7), "BindingReport(requested=None, refused=(), pid=7, late=False)"),
        (Core((0, 4)), "Core(cpus=(0, 4), kind='')"),
        (
            Placed(Binding(None)),
            "Placed(binding=Binding(cpus=None, memory=None, required=True), device=None, node=None,",
        ),
        (Device("0000:3b:00.0", 1), "Device(address='0000:3b:00.0', node=1, local_cpus=frozenset(),"),
    ],
)
def test_our_data(one: Any, shown: str) -> None:
    assert repr(one).startswith(shown)
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one == one.replace()
    assert hash(one) == hash(one.replace())


def test_options_are_a_dataclass_for_torch() -> None:
    options = NumaOptions(AffinityMode.NODE, memory_policy=POLICY)
    told = dataclasses.asdict(options)
    assert told == {
        "affinity_mode": "node",
        "should_fall_back_if_binding_fails": False,
        "memory_policy": POLICY,
    }
    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.parametrize(
    "make", [Binding, lambda ids: MemoryPolicy("bind", ids), lambda ids: BINDING.replace(cpus=ids)]
)
@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([], ValueError),
        ({-1}, ValueError),
        ({1 << 30}, ValueError),
        ("0-3", TypeError),
        (b"\0", TypeError),
        ({0.0}, TypeError),
        ({"0"}, TypeError),
        ({True}, TypeError),
        (7, TypeError),
    ],
)
def test_ids_are_checked(make: Callable[[Any], object], ids: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        make(ids)


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_policies_are_checked(mode: Any) -> None:
    most = {"default": 0, "local": 0, "preferred": 1}.get(mode, 3)
    for count in range(4):
        if min(most, 1) <= count <= most:
            assert MemoryPolicy(mode, range(count)).nodes == frozenset(range(count))
        else:
            with pytest.raises(ValueError, match=mode):
                MemoryPolicy(mode, range(count))


def test_bindings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"memory policy: expected one of default, local, .*, got 'far'"):
        MemoryPolicy("far", {0})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="memory: expected a MemoryPolicy or None, got '"):
        Binding(None, "bind")  # type: ignore[arg-type]
    assert (BINDING.cpus, BINDING.memory, POLICY.nodes) == (frozenset({0, 1, 2}), POLICY, frozenset({0, 1}))
    assert (str(BINDING), str(Binding(None))) == ("cpus 0-2, memory interleave:0-1", "cpus inherited, memory inherited")


@pytest.mark.skipif(_engine.EXTENSION_ERROR is not None, reason="the engine packs the masks")
def test_packed_masks_stay_with_their_binding() -> None:
    binding = BINDING.replace()
    packed = _engine.masks(binding)
    assert _engine.masks(binding) is packed
    assert binding == BINDING and hash(binding) == hash(BINDING) and repr(binding) == repr(BINDING)
    for other in (binding.replace(), copy.copy(binding), pickle.loads(pickle.dumps(binding))):
        assert vars(other) == {"cpus": binding.cpus, "memory": binding.memory, "required": False}
        assert _engine.masks(other) == packed
    assert _engine.masks(binding.replace(cpus={5})) != packed
