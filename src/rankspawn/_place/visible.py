"""Which accelerators a rank would see, and in which order, by the environment variables of the three vendors.

Each vendor's function takes all devices of the machine, in the driver's order. It returns those that stay visible, in
the runtime's order. It reads a list as the runtime does, even with mistakes, and a note says what a mistake hides.
NVIDIA_VISIBLE_DEVICES is not read, because a container's runtime has already used it to put devices into the container.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .._binding import PlacementError
from .._frozen import Frozen

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "ZE_FLAT_DEVICE_HIERARCHY",
    "ONEAPI_DEVICE_SELECTOR",
)
"""Every variable that this module reads."""


class DeviceError(PlacementError):
    """A device does not exist, or an environment variable or option cannot be understood."""


class Device(Frozen):
    """One accelerator.

    Attributes:
        address: Its PCI address, as sysfs writes it ("0000:3b:00.0").
        node: numa_node of sysfs; -1 if the firmware does not say it.
        local_cpus: local_cpulist of sysfs; empty if unknown.
        driver_cpus: The same by NVML; empty if unknown.
        vendor: "nvidia", "amd" or "intel"; "" if unknown.
        name: The model; "" if unknown.
        uuid: The vendor's UUID; "" if unknown.
        partitions: The UUIDs of its MIG instances, or the numbers of its tiles.
        notes: What rankspawn had to assume about it, in words.
    """

    address: str
    node: int = -1
    local_cpus: frozenset[int] = frozenset()
    driver_cpus: frozenset[int] = frozenset()
    vendor: str = ""
    name: str = ""
    uuid: str = ""
    partitions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Visible(Frozen):
    """The devices that the variables leave.

    Attributes:
        devices: In the order in which the vendor's runtime counts them.
        notes: What a list hides by mistake, or that all devices are hidden, in words.
    """

    devices: tuple[Device, ...]
    notes: tuple[str, ...] = ()


def nvidia_visible(found: Sequence[Device], environ: Mapping[str, str]) -> Visible:
    """List NVIDIA GPUs as CUDA counts them (CUDA C++ Programming Guide, "CUDA Environment Variables").

    CUDA_VISIBLE_DEVICES contains ordinals, or UUIDs ("GPU-...") or unique beginnings of them, or MIG instances. The
    first word says which. The list ends before the first word that names no device, so "NoDevFiles" (Slurm's word) and
    -1 (the usual one) hide all. Of a number only the digits at its beginning count, as for strtoul(3).
    ``found`` is in PCI order. Without CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA puts the fastest first. For GPUs of one model
    that is the same order. For several models only CUDA knows the order, and the devices get a note.

    Raises:
        DeviceError: The list names a device twice (CUDA would silently show no device), or a UUID cannot be found.
    """
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    models = sorted({device.name for device in found})
    if len(models) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        note = (
            f"GPUs of several models ({', '.join(models)}): CUDA counts the fastest first, but rankspawn counts by"
            " PCI address; set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
        by_ordinal: Sequence[Device] = [device.replace(notes=(*device.notes, note)) for device in found]
    else:
        by_ordinal = found
    if listed is None:
        return Visible(tuple(by_ordinal))
    words = [word.strip() for word in listed.split(",")]
    kind = next((kind for kind in ("GPU-", "MIG-") if words[0].startswith(kind)), "")
    chosen: list[Device] = []
    seen = set()
    ended = None
    for word in words:
        number = _digits(word)
        device = None
        if kind and word.startswith(kind):
            device = _nvidia_by_uuid(found, word)
        elif number and not kind and int(number) < len(by_ordinal):
            device = by_ordinal[int(number)]
        if device is None:
            ended = word
            break
        named = word if kind else int(number)
        if named in seen:
            raise DeviceError(f"CUDA_VISIBLE_DEVICES={listed!r}: {word!r} is listed twice, which hides all devices")
        seen.add(named)
        chosen.append(device)
    return _noted("CUDA_VISIBLE_DEVICES", listed, words, ended, found, chosen)


def rocm_visible(found: Sequence[Device], environ: Mapping[str, str]) -> Visible:
    """List AMD GPUs as HIP counts them (ROCm documentation, "GPU isolation techniques").

    ROCR_VISIBLE_DEVICES chooses by ordinal or UUID ("GPU-" and 16 hexadecimal digits, or a beginning of it).
    HIP_VISIBLE_DEVICES, or CUDA_VISIBLE_DEVICES in its place, chooses among what is left. Both lists end before the
    first word that names no device; the first also before a device that it has already. An empty ROCR_VISIBLE_DEVICES
    hides all, and the other two, when empty, nothing. HIP reads no GPU_DEVICE_ORDINAL: that is OpenCL's.
    """
    left = Visible(tuple(found))
    name = "ROCR_VISIBLE_DEVICES"
    listed = environ.get(name)
    if listed is not None:
        words = [word.strip() for word in listed.split(",")]
        left = _rocm_listed(name, listed, words, found, once=True)
    name = "HIP_VISIBLE_DEVICES" if environ.get("HIP_VISIBLE_DEVICES") else "CUDA_VISIBLE_DEVICES"
    listed = environ.get(name)
    if listed and left.devices:
        chosen = _rocm_listed(name, listed, listed.split(","), left.devices, once=False)
        left = Visible(chosen.devices, (*left.notes, *chosen.notes))
    return left


def _rocm_listed(name: str, listed: str, words: Sequence[str], among: Sequence[Device], *, once: bool) -> Visible:
    """Find the devices that a list of ordinals and UUIDs leaves, with notes about it."""
    chosen: list[int] = []
    ended = None
    for word in words:
        number = -1
        if word.upper().startswith("GPU-"):
            device = _by_prefix(name, among, word)
            number = -1 if device is None else among.index(device)
        elif word.isascii() and word.isdecimal() and int(word) < len(among):
            number = int(word)
        if number < 0 or (once and number in chosen):
            ended = word
            break
        if number not in chosen:
            chosen.append(number)
    return _noted(name, listed, words, ended, among, [among[number] for number in chosen])


def intel_visible(found: Sequence[Device], environ: Mapping[str, str]) -> Visible:
    """List Intel GPUs as Level Zero, and SYCL on top of it, count them (their "Environment Variables").

    With ZE_FLAT_DEVICE_HIERARCHY FLAT (the default) or COMBINED each tile counts as a device; with COMPOSITE a whole
    card does, and "0.1" in the mask is its tile 1. ZE_AFFINITY_MASK filters, and does not permute. From what it leaves,
    ONEAPI_DEVICE_SELECTOR chooses by terms like "level_zero:0,1" and "!level_zero:0".

    Raises:
        DeviceError: A variable cannot be understood.
    """
    flat = environ.get("ZE_FLAT_DEVICE_HIERARCHY", "FLAT").upper() != "COMPOSITE"
    left = [device for device in found for _ in (device.partitions or ("0",))] if flat else list(found)
    notes: list[str] = []
    for name, choose in (("ZE_AFFINITY_MASK", _masked), ("ONEAPI_DEVICE_SELECTOR", _selected)):
        text = environ.get(name, "").strip()
        if text and left:
            among = left
            wanted = choose(text, len(among))
            left = [device for i, device in enumerate(among) if i in wanted]
            notes += _noted(name, text, (), None, among, left).notes
    return Visible(tuple(left), tuple(notes))


def _masked(mask: str, count: int) -> set[int]:
    """Read ZE_AFFINITY_MASK: the numbers of the devices that it leaves."""
    wanted = set()
    for word in filter(None, map(str.strip, mask.split(","))):
        number = word.partition(".")[0]
        if not (number.isascii() and number.isdecimal()):
            raise DeviceError(f"ZE_AFFINITY_MASK={mask!r}: {word!r} is not a device number like 0 or 0.1")
        wanted.add(int(number))
    return wanted


def _selected(selector: str, count: int) -> set[int]:
    """Read ONEAPI_DEVICE_SELECTOR: the numbers of the Level Zero GPUs that it accepts and does not discard.

    A term is BACKEND:DEVICE,...; a device is "*", "gpu", a number, or one of these with its parts ("0.1", "*.*").
    If all terms discard ("!level_zero:0"), all other devices are accepted.
    """
    accepted, discarded, all = set(), set(), set(range(count))
    discards_only = True
    for term in filter(None, map(str.strip, selector.lower().split(";"))):
        backend, colon, devices = term.removeprefix("!").partition(":")
        if not colon or not devices:
            raise DeviceError(f"ONEAPI_DEVICE_SELECTOR={selector!r}: {term!r} is not a term like level_zero:0,1")
        chosen: set[int] = set()
        for word in devices.split(","):
            root = word.strip().partition(".")[0]
            if root in ("*", "gpu"):
                chosen |= all
            elif root.isascii() and root.isdecimal():
                chosen.add(int(root))
            elif root not in ("cpu", "fpga"):
                raise DeviceError(f"ONEAPI_DEVICE_SELECTOR={selector!r}: {word!r} is not a device like gpu, * or 0")
        if backend.strip() not in ("*", "level_zero"):
            chosen = set()
        if term.startswith("!"):
            discarded |= chosen
        else:
            discards_only = False
            accepted |= chosen
    return (all if discards_only else accepted) - discarded


def _noted(
    variable: str, text: str, words: Sequence[str], ended: str | None, found: Sequence[Device], chosen: Sequence[Device]
) -> Visible:
    """Say what a variable hides by mistake, or that it hides everything.

    Args:
        variable: Its name.
        text: Its value.
        words: The words of its list; empty if the value is no list.
        ended: The word before which the list ended; None if all words count.
        found: All devices.
        chosen: The devices that it leaves.
    """
    note = ""
    cut = next((word for word in words[: len(chosen)] if _digits(word) not in ("", word)), "")
    # A comma at the end, and -1, are no mistakes: nobody could have meant anything else.
    if chosen and ended is not None and not ended.startswith("-") and (ended or any(words[len(chosen) + 1 :])):
        note = (
            f"{variable}={text!r}: {ended!r} is no device here, and the list ends before it: {_count(chosen)} visible"
        )
    elif cut:
        note = f"{variable}={text!r}: {cut!r} is read as {_digits(cut)}: {_count(chosen)} visible"
    elif found and not chosen:
        note = f"{variable}={text!r} hides all accelerators ({len(found)})"
    return Visible(tuple(chosen), (note,) if note else ())


def _digits(word: str) -> str:
    """The number at the beginning of a word, as strtoul(3) finds it; "" for none."""
    number = re.match(r"\+?[0-9]+", word)
    return number[0] if number else ""


def _count(devices: Sequence[Device]) -> str:
    return f"{len(devices)} device{'s are' if len(devices) > 1 else ' is'}"


def _nvidia_by_uuid(found: Sequence[Device], word: str) -> Device | None:
    """Find a GPU by UUID or its beginning, or a MIG instance by its UUID.

    Drivers before R470 name an instance "MIG-GPU-<UUID of the GPU>/<gi>/<ci>".
    """
    if word.startswith("MIG-GPU-"):
        return _by_prefix("CUDA_VISIBLE_DEVICES", found, word.removeprefix("MIG-").partition("/")[0])
    if word.startswith("GPU-"):
        return _by_prefix("CUDA_VISIBLE_DEVICES", found, word)
    matches = [device for device in found if any(one.startswith(word) for one in device.partitions)]
    if not matches and not any(device.partitions for device in found):
        raise DeviceError(
            f"CUDA_VISIBLE_DEVICES: only NVML knows which GPU has {word!r}: install nvidia-ml-py, or name the"
            " GPUs with --devices"
        )
    return matches[0] if len(matches) == 1 else None


def _by_prefix(variable: str, found: Sequence[Device], word: str) -> Device | None:
    matches = [device for device in found if device.uuid.lower().startswith(word.lower())]
    if len(matches) > 1:
        raise DeviceError(f"{variable}: {word!r} is the beginning of {len(matches)} UUIDs; give more of it")
    if not matches and found and not any(set(device.uuid) - set("GPU-?") for device in found):
        # The driver's proc files show question marks until a process has used the GPU.
        raise DeviceError(
            f"{variable}: {word!r} cannot be looked up, because the driver shows no UUIDs: install nvidia-ml-py,"
            " or name the GPUs with --devices"
        )
    return matches[0] if matches else None
