"""Which accelerators a rank would see, and in which order: the environment variables of the three vendors.

Each vendor's function takes all devices of the machine, in the order in which the driver counts them, and returns those
that stay visible, in the order in which the runtime counts them.
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
"""Every variable that is read here."""


class DeviceError(PlacementError):
    """A device that is not there, or an environment variable or option that cannot be understood."""


class Device(Frozen):
    """One accelerator.

    Attributes:
        address: Its PCI address, as sysfs writes it ("0000:3b:00.0").
        node: numa_node of sysfs; -1 where the firmware does not say it.
        local_cpus: local_cpulist of sysfs; empty where unknown.
        driver_cpus: The same by NVML; empty where unknown.
        vendor: "nvidia", "amd" or "intel"; "" where unknown.
        name: The model; "" where unknown.
        uuid: "" where unknown.
        partitions: The UUIDs of its MIG instances, or the numbers of its tiles.
        notes: What had to be assumed of it, in words.
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
    """List NVIDIA GPUs as CUDA counts them (CUDA C++ Programming Guide, "CUDA Environment Variables").

    CUDA_VISIBLE_DEVICES holds ordinals, UUIDs ("GPU-...") or unique beginnings of them, or MIG instances; the first
    one that does not exist hides itself and all that follow; -1 is the usual way to hide them.
    ``found`` is in PCI order. Without CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA puts the fastest first. Among GPUs of one model
    that is the same order; among several models only CUDA knows it, and the devices get a note.
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
    """List AMD GPUs as HIP counts them (ROCm documentation, "GPU isolation techniques").

    ROCR_VISIBLE_DEVICES chooses by ordinal or UUID ("GPU-" and 16 hexadecimal digits). HIP_VISIBLE_DEVICES, or
    CUDA_VISIBLE_DEVICES in its place, chooses among what is left.
    """
    left = tuple(found)
    hip = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in environ else "CUDA_VISIBLE_DEVICES"
    for name in ("ROCR_VISIBLE_DEVICES", hip):
        if name in environ:
            among = left
            left = _listed(name, environ[name], among, lambda word: _by_prefix(name, among, word))  # noqa: B023
    return left


def intel_visible(found: Sequence[Device], environ: Mapping[str, str]) -> tuple[Device, ...]:
    """List Intel GPUs as Level Zero counts them (its specification, "Environment Variables").

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
    """Find the devices that a list of ordinals and names chooses, up to the first that does not exist.

    For a device named twice, and for a word that is neither, the runtimes show no devices and no message. A launcher
    that placed ranks as on a machine without devices would hide the mistake, so both are errors here.
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
        # The driver's proc files hold question marks until the GPU has been used once.
        raise DeviceError(
            f"{variable}: {word!r} cannot be looked up, because the driver shows no UUIDs: install nvidia-ml-py,"
            " or name the GPUs with --devices"
        )
    return matches[0] if matches else None
