"""The memory of a CUDA device, by NVML where it can: it sees other processes' bytes where CUDA does not (WSL)."""

import torch

from .accelerator_memory import AcceleratorMemory, FreeMemory


class CudaMemory(AcceleratorMemory):
    """The same by ``torch.cuda``, which has it in all versions of torch, and by NVML."""

    @property
    def name(self) -> str:
        # torch numbers the visible devices: those of another process may be others.
        return str(getattr(torch.cuda.get_device_properties(self.device), "uuid", self.device))

    def free(self) -> FreeMemory:
        return self._by_nvml() or FreeMemory(*torch.cuda.mem_get_info(self.device), reader="CUDA")

    def _by_nvml(self) -> FreeMemory | None:
        """None where NVML cannot tell (no library, MIG slices, WSL, ROCm)."""
        try:
            import pynvml

            pynvml.nvmlInit()
            try:
                # NVML numbers every device of the machine, torch only the visible ones: the UUID is common to both.
                uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
                memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid))
                return FreeMemory(int(memory.free), int(memory.total), "NVML")
            finally:
                pynvml.nvmlShutdown()
        except Exception:  # NVML's errors are many and none may stop training: CUDA's own number is nearly as good
            return None

    @property
    def allocated_bytes(self) -> int:
        return int(torch.cuda.memory_allocated(self.device))

    @property
    def reserved_bytes(self) -> int:
        return int(torch.cuda.memory_reserved(self.device))

    @property
    def peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated(self.device))

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
