"""What NVML says of a GPU becomes a reason that names the GPU; what it does not say leaves the counting alone."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from dist_lm.cluster.gpu_health import Health, HealthWatch


class FakeNvml:
    """The part of `pynvml` that is read, with a healthy GPU at each index; `broken` gives other answers by function."""

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__({15: "GPU is lost", 4: "Insufficient Permissions"}.get(value, f"error {value}"))
            self.value = value

    NVML_SUCCESS, NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION, NVML_ERROR_TIMEOUT = 0, 3, 4, 10
    NVML_ERROR_FUNCTION_NOT_FOUND, NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED = 13, 15, 16
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 1, 0, 230
    nvmlEventTypeXidCriticalError = 8
    nvmlClocksThrottleReasonHwSlowdown, nvmlClocksThrottleReasonSwThermalSlowdown = 0x08, 0x20
    nvmlClocksThrottleReasonHwThermalSlowdown, nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 0x40, 0x80

    def __init__(self, at: str = "", **broken: Any) -> None:
        self._at, self._broken = at, broken
        self._xids: dict[Any, deque[int]] = {}

    def _answer(self, gpu: str, name: str, healthy: Any) -> Any:
        answer = self._broken.get(name, healthy) if gpu == self._at else healthy
        if isinstance(answer, int) and name in self._broken.get("errors", ()) and gpu == self._at:
            raise self.NVMLError(answer)
        return answer

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self._answer(str(index), "handle", 0)
        return str(index)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlEventSetCreate(self) -> SimpleNamespace:
        return SimpleNamespace(gpu=None)

    def nvmlDeviceRegisterEvents(self, gpu: str, kinds: int, events: Any) -> None:
        assert kinds == self.nvmlEventTypeXidCriticalError
        events.gpu, events.xids = gpu, deque(self._answer(gpu, "xids", ()))

    def nvmlEventSetWait_v2(self, events: Any, timeout_ms: int) -> Any:
        if not events.xids:
            raise self.NVMLError(self.NVML_ERROR_TIMEOUT)
        return SimpleNamespace(eventData=events.xids.popleft())

    def nvmlDeviceGetFieldValues(self, gpu: str, fields: list[int]) -> list[Any]:
        assert fields == [self.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        action = self._answer(gpu, "recovery", 0)
        return [SimpleNamespace(nvmlReturn=3 if action is None else 0, value=SimpleNamespace(uiVal=action))]

    def nvmlDeviceGetTotalEccErrors(self, gpu: str, kind: int, counter: int) -> int:
        assert (kind, counter) == (self.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, self.NVML_VOLATILE_ECC)
        return self._answer(gpu, "ecc", 0)

    def nvmlDeviceGetRemappedRows(self, gpu: str) -> Any:
        return self._answer(gpu, "rows", (7, 1, 0, 0))  # rows that have been remapped are harmless

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: str) -> int:
        return self._answer(gpu, "throttled", 0x05)  # idle, and the power cap of every loaded card


def health_of(nvml: Any, gpus: tuple[str, ...] = ("0", "1", "2")) -> Health:
    watch = HealthWatch(nvml, gpus)
    watch.look()
    watch.look()
    return watch.read()


def test_a_healthy_node_has_no_faults():
    assert health_of(FakeNvml()) == Health()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"xids": (79,)}, "XID error 79"),
        ({"recovery": 2}, "reboot the node"),
        ({"ecc": 3}, "3 uncorrected ECC errors"),
        ({"rows": (0, 1, 1, 0)}, "waits to be remapped: reset the GPU"),
        ({"rows": (0, 9, 1, 1)}, "remapping a damaged memory row failed: replace the GPU"),
        ({"ecc": 15, "errors": ("ecc",)}, "GPU is lost"),
        ({"handle": 16, "errors": ("handle",)}, "error 16"),
    ],
)
def test_a_fault_names_the_gpu(broken, words):
    found = health_of(FakeNvml("1", **broken))
    [fault] = found.faults
    assert fault.startswith("GPU 1: ")
    assert words in fault
    assert not found.throttled


@pytest.mark.parametrize(
    ("bits", "cause"),
    [(0x20, "temperature"), (0x48, "temperature"), (0x88, "power brake"), (0x08, "hardware")],
)
def test_a_throttled_gpu_is_slow_not_faulty(bits, cause):
    found = health_of(FakeNvml("GPU-b", throttled=bits | 0x04), ("GPU-a", "GPU-b"))
    [slow] = found.throttled
    assert slow.startswith("GPU GPU-b: slowed down by ")
    assert cause in slow
    assert not found.faults


def test_what_a_card_does_not_count_and_errors_of_programs_are_no_fault():
    silent = FakeNvml(
        "1", xids=(13, 31, 43), recovery=None, ecc=3, rows=3, throttled=3, errors=("ecc", "rows", "throttled")
    )
    assert health_of(silent) == Health()


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [
        ("the package nvidia-ml-py is not installed", "nvidia-ml-py is not installed"),
        (FakeNvml("1", ecc=4, errors=("ecc",)), "NVML: Insufficient Permissions"),
    ],
)
def test_a_refusal_is_told_and_is_no_fault(nvml, reason):
    found = health_of(nvml)
    assert reason in found.unread
    assert not found.faults


def test_the_fake_has_the_names_and_numbers_of_the_library():
    pynvml = pytest.importorskip("pynvml")
    for name in [name for name in vars(FakeNvml) if not name.startswith("_")]:
        own, real = getattr(FakeNvml, name), getattr(pynvml, name)
        assert own == real if isinstance(own, int) else callable(real), name
