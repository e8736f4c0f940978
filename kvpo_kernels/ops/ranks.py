"""How the ranks of a process group meet before they share branches, so that all fail alike."""

import torch
import torch.distributed as dist

from kvpo_kernels.errors import DtypeError, GroupError

# The header of a rank: whether its own arguments are good, then what all ranks must agree on.
AGREED = (
    "dtype",
    "presence of ref_scores",
    "clip_range_low",
    "clip_range_high",
    "kl_coef",
    "log_ratio_clamp",
    "min_update_entropy_ratio",
    "scale",
    "branch_mass",
    "nonfinite",
    "protect",
    "safe",
    "gradient",
)


def announce_failure(group: dist.ProcessGroup) -> None:
    """Take part in the first collective of a group's loss, only to say that this rank cannot."""
    all_gather_header([1.0] + [0.0] * (1 + len(AGREED)), group)


def check_member(group: dist.ProcessGroup) -> None:
    """Raise GroupError on a process that is not of the group: nobody waits for it."""
    outside = dist.GroupMember.NON_GROUP_MEMBER  # what `new_group` gives those it leaves out
    if not isinstance(group, dist.ProcessGroup) and group is not outside:
        raise DtypeError(f"group must be a process group, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise GroupError("this process is not a rank of `group`")


def meeting_place(group: dist.ProcessGroup) -> torch.device:
    """Where the ranks exchange scalars: the same kind of device on each, whatever its tensors."""
    kinds = {device.type for device in group._device_types}
    return torch.device("cpu" if "cpu" in kinds or not kinds else kinds.pop())


def all_gather_header(header: list[float], group: dist.ProcessGroup) -> list[list[float]]:
    """The header of every rank, in rank order."""
    own = torch.tensor(header, dtype=torch.float64, device=meeting_place(group))
    headers = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(headers, own, group=group)
    return [h.tolist() for h in headers]
