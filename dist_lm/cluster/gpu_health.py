"""The health of a node's GPUs by NVML: XID errors, ECC errors, remapped rows, throttling.

Meanings: NVIDIA's NVML API reference and "XID Errors" (docs.nvidia.com/deploy). Figures that a card or driver does not
count are skipped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

APPLICATION_XIDS = frozenset(
    (13, 31, 43, 45, 68, 109)
)  # errors of a program; NVIDIA's k8s-device-plugin skips them too
RECOVERY = {1: "reset the GPU", 2: "reboot the node", 3: "drain its peers", 4: "drain and reset the GPU"}


@dataclass(frozen=True)
class Health:
    """The health of the GPUs of a node; texts name the GPU."""

    faults: tuple[str, ...] = ()  # the GPU must not be used
    throttled: tuple[str, ...] = ()  # the GPU works, slower than it could
    unread: str = ""  # why NVML says nothing


class HealthWatch:
    """Watches GPUs from its creation on; look while they are loaded, because an idle GPU is not throttled."""

    def __init__(self, nvml: Any, gpus: Sequence[str]) -> None:
        """
        Args:
            nvml: the module `pynvml`, initialised, or a text that says why there is none.
            gpus: indices or UUIDs.
        """
        self._nvml = nvml
        self._unread = ""
        self._faults: dict[str, None] = {}  # keeps the order
        self._throttled: dict[str, None] = {}
        self._gpus: dict[str, tuple[Any, Any]] = {}  # handle, set of XID events
        if isinstance(nvml, str):
            self._unread = nvml
            return
        for gpu in gpus:
            handle = self._ask(gpu, lambda gpu=gpu: self._handle(gpu))
            if handle is not None:
                self._gpus[gpu] = handle, self._ask(gpu, lambda handle=handle: self._listen(handle))

    def look(self) -> None:
        """Notes which GPUs are throttled now, and why."""
        nvml = self._nvml
        for gpu, (handle, _) in self._gpus.items():
            reasons = self._ask(gpu, lambda handle=handle: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0

            # The bit for the hardware is set together with the more exact ones, so it comes last.
            causes = {
                nvml.nvmlClocksThrottleReasonSwThermalSlowdown
                | nvml.nvmlClocksThrottleReasonHwThermalSlowdown: "its temperature",
                nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "the power brake",
                nvml.nvmlClocksThrottleReasonHwSlowdown: "the hardware",
            }
            for bits, cause in causes.items():
                if reasons & bits:
                    self._throttled[f"GPU {gpu}: slowed down by {cause}"] = None
                    break

    def read(self) -> Health:
        """Returns the health, with what was noted since the creation."""
        for gpu in self._gpus:
            for fault in self._faults_of(gpu):
                self._faults[f"GPU {gpu}: {fault}"] = None
        return Health(tuple(self._faults), tuple(self._throttled), self._unread)

    def _faults_of(self, gpu: str) -> list[str]:
        """Returns what is wrong with a GPU now, in words; empty if nothing is. It takes the XID errors since the last
        call."""
        nvml = self._nvml
        handle, events = self._gpus[gpu]
        faults = [f"XID error {xid}" for xid in self._ask(gpu, lambda: self._xids(events)) or ()]

        action = self._ask(gpu, lambda: self._recovery(handle))
        if action:
            faults.append(f"the driver asks for a recovery after an error: {RECOVERY.get(action, f'action {action}')}")

        uncorrected, volatile = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        errors = self._ask(gpu, lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, uncorrected, volatile))
        if errors:
            faults.append(f"{errors} uncorrected ECC errors since the driver started: reset the GPU")

        _, _, pending, failed = self._ask(gpu, lambda: nvml.nvmlDeviceGetRemappedRows(handle)) or (0, 0, 0, 0)
        if failed:
            faults.append("remapping a damaged memory row failed: replace the GPU")
        elif pending:
            faults.append("a damaged memory row waits to be remapped: reset the GPU")
        return faults

    def _handle(self, gpu: str) -> Any:
        if gpu.isdecimal():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(gpu))
        return self._nvml.nvmlDeviceGetHandleByUUID(gpu)

    def _listen(self, handle: Any) -> Any:
        # Only errors from now on count: the driver does not tell older ones.
        events = self._nvml.nvmlEventSetCreate()
        self._nvml.nvmlDeviceRegisterEvents(handle, self._nvml.nvmlEventTypeXidCriticalError, events)
        return events

    def _xids(self, events: Any) -> list[int]:
        """Returns the XID errors since the last call, without those of programs; empty if the card reports none.

        Raises:
            NVMLError: NVML cannot be asked; `_ask` catches it.
        """
        # Events queue up at the driver; a wait of 0 ms that times out has emptied the queue.
        xids: list[int] = []
        while events is not None:
            try:
                xids.append(int(self._nvml.nvmlEventSetWait_v2(events, 0).eventData))
            except self._nvml.NVMLError as error:
                if error.value == self._nvml.NVML_ERROR_TIMEOUT:
                    break
                raise
        return [xid for xid in xids if xid not in APPLICATION_XIDS]

    def _recovery(self, handle: Any) -> int:
        [field] = self._nvml.nvmlDeviceGetFieldValues(handle, [self._nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
        return int(field.value.uiVal) if field.nvmlReturn == self._nvml.NVML_SUCCESS else 0

    def _ask(self, gpu: str, question: Callable[[], Any]) -> Any:
        """Returns the answer; None after an error of NVML. Then a lost GPU is noted as a fault, a question that card or
        driver cannot answer not at all, and any other error as unread figures of the node.
        """
        nvml = self._nvml
        # Cards and drivers differ in the questions that they answer.
        try:
            return question()
        except nvml.NVMLError as error:
            if error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED):
                self._faults[f"GPU {gpu}: {error}"] = None
            elif error.value not in (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_FUNCTION_NOT_FOUND):
                self._unread = self._unread or f"NVML: {error}"
            return None
