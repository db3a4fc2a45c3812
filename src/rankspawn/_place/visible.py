"""Which accelerators a rank would see, and in which order: the environment variables of the three vendors.

Each vendor's function takes all devices of the machine, in the order in which its driver counts them, and gives those
that stay visible, in the order in which its runtime counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .._binding import PlacementError
from .._frozen import Frozen

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "ZE_FLAT_DEVICE_HIERARCHY",
)
"""Every variable that is looked at here."""


class DeviceError(PlacementError):
    """A device that is not there, or an environment variable or option that cannot be understood."""


class Device(Frozen):
    """One accelerator.

    address: PCI, as sysfs writes it ("0000:3b:00.0"). node: sysfs numa_node, -1 where the firmware does not say.
    local_cpus: sysfs local_cpulist; driver_cpus: the same by NVML; both empty where they are not told.
    vendor, name, uuid: "" where unknown. partitions: UUIDs of its MIG instances, or numbers of its tiles.
    notes: what had to be assumed of it, in words.
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


def nvidia_visible(found: Sequence[Device], environ: Mapping[str, str]) -> tuple[Device, ...]:
    """NVIDIA GPUs as CUDA counts them (CUDA C++ Programming Guide, "CUDA Environment Variables").

    CUDA_VISIBLE_DEVICES holds ordinals, UUIDs ("GPU-...") or unique beginnings of them, or MIG instances; the first
    one that does not exist hides itself and all that follow; -1 is the usual way to say so.
    ``found`` is in PCI order. Without CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA puts the fastest first; that is the same
    among GPUs of one model, and known to CUDA alone otherwise, which is noted where ordinals depend on it.
    """
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    models = sorted({device.name for device in found})
    if len(models) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        note = (
            f"GPUs of several models ({', '.join(models)}): CUDA counts the fastest first, here they are counted by PCI"
            " address; set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
        by_ordinal: Sequence[Device] = [device.replace(notes=(*device.notes, note)) for device in found]
    else:
        by_ordinal = found
    if listed is None:
        return tuple(by_ordinal)
    return _listed("CUDA_VISIBLE_DEVICES", listed, by_ordinal, lambda word: _nvidia_by_uuid(found, word))


def rocm_visible(found: Sequence[Device], environ: Mapping[str, str]) -> tuple[Device, ...]:
    """AMD GPUs as HIP counts them: ROCR_VISIBLE_DEVICES chooses by ordinal or UUID ("GPU-" and 16 hexadecimal digits),
    and HIP_VISIBLE_DEVICES, or CUDA_VISIBLE_DEVICES in its place, chooses among what is left (ROCm documentation,
    "GPU isolation techniques")."""
    left = tuple(found)
    hip = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in environ else "CUDA_VISIBLE_DEVICES"
    for name in ("ROCR_VISIBLE_DEVICES", hip):
        if name in environ:
            among = left
            left = _listed(name, environ[name], among, lambda word: _by_prefix(name, among, word))  # noqa: B023
    return left


def intel_visible(found: Sequence[Device], environ: Mapping[str, str]) -> tuple[Device, ...]:
    """Intel GPUs as Level Zero counts them (its specification, "Environment Variables").

    With ZE_FLAT_DEVICE_HIERARCHY FLAT (the default) or COMBINED each tile counts as a device; with COMPOSITE a whole
    card does, and "0.1" in the mask is its tile 1. ZE_AFFINITY_MASK filters, it does not permute.
    """
    flat = environ.get("ZE_FLAT_DEVICE_HIERARCHY", "FLAT").upper() != "COMPOSITE"
    all = [device for device in found for _ in (device.partitions or ("0",))] if flat else list(found)
    mask = environ.get("ZE_AFFINITY_MASK", "").strip()
    if not mask:
        return tuple(all)
    wanted = set()
    for word in mask.split(","):
        number = word.strip().partition(".")[0]
        if not (number.isascii() and number.isdecimal()):
            raise DeviceError(f"ZE_AFFINITY_MASK={mask!r}: {word!r} is not a device number like 0 or 0.1")
        wanted.add(int(number))
    return tuple(device for i, device in enumerate(all) if i in wanted)


def _listed(
    variable: str, text: str, found: Sequence[Device], by_name: Callable[[str], Device | None]
) -> tuple[Device, ...]:
    """The devices that a list of ordinals and names chooses, up to the first that does not exist.

    The runtimes answer a device named twice, and words that are neither, with no devices at all and no message; a
    launcher that then placed ranks as on a machine without devices would hide the mistake, so both are errors here.
    """
    chosen: list[Device] = []
    seen = set()
    for word in (part.strip() for part in text.split(",")) if text.strip() else ():
        digits = word.removeprefix("-")
        if digits.isascii() and digits.isdecimal():
            number = int(word)
            device = found[number] if 0 <= number < len(found) else None
        elif word.startswith(("GPU-", "MIG-")):
            device = by_name(word)
        else:
            raise DeviceError(f"{variable}={text!r}: {word!r} is neither a number nor a UUID")
        if device is None:
            break
        if word in seen:
            raise DeviceError(f"{variable}={text!r}: {word!r} is there twice, which hides all devices")
        seen.add(word)
        chosen.append(device)
    return tuple(chosen)


def _nvidia_by_uuid(found: Sequence[Device], word: str) -> Device | None:
    """A GPU by UUID or its beginning; a MIG instance by its UUID, or by "MIG-GPU-<UUID of the GPU>/<gi>/<ci>", the
    form of drivers before R470."""
    if word.startswith("MIG-GPU-"):
        return _by_prefix("CUDA_VISIBLE_DEVICES", found, word.removeprefix("MIG-").partition("/")[0])
    if word.startswith("GPU-"):
        return _by_prefix("CUDA_VISIBLE_DEVICES", found, word)
    matches = [device for device in found if any(one.startswith(word) for one in device.partitions)]
    if not matches and not any(device.partitions for device in found):
        raise DeviceError(
            f"CUDA_VISIBLE_DEVICES: which GPU has {word!r} is known to NVML alone: install nvidia-ml-py, or name the"
            " GPUs with --devices"
        )
    return matches[0] if len(matches) == 1 else None


def _by_prefix(variable: str, found: Sequence[Device], word: str) -> Device | None:
    matches = [device for device in found if device.uuid.lower().startswith(word.lower())]
    if len(matches) > 1:
        raise DeviceError(f"{variable}: {word!r} is the beginning of {len(matches)} UUIDs; give more of it")
    if not matches and found and not any(set(device.uuid) - set("GPU-?") for device in found):
        # The driver's proc files hold question marks until the GPU was used once.
        raise DeviceError(
            f"{variable}: {word!r} cannot be looked up, the driver tells no UUIDs: install nvidia-ml-py, or name the"
            " GPUs with --devices"
        )
    return matches[0] if matches else None
