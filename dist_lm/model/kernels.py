"""Which attention kernel runs where. Plain Python: a dry run asks too."""

FLASH_MULTIPLE, FLASH_LARGEST = 8, 256  # widths of a head that the flash kernel takes


def packs_documents(device_type: str, half: bool, d_head: int) -> bool:
    """Whether documents go to the variable-length flash kernel, whose cost falls with their length, not to a mask.

    Args:
        device_type: cuda | cpu.
        half: queries and keys are bf16 (or fp16).
    """
    return device_type == "cuda" and half and d_head % FLASH_MULTIPLE == 0 and d_head <= FLASH_LARGEST


def documents_apart(device_type: str, half: bool, d_head: int) -> bool:
    """Whether documents are computed apart, by that kernel or on a CPU call by call, and so no mask is kept.

    Arguments are those of `packs_documents`.
    """
    return device_type == "cpu" or packs_documents(device_type, half, d_head)
