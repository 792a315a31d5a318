"""Which sub-modules of the towers are their repeated blocks."""

from torch import nn

__all__ = ["units"]


def units(clip: nn.Module) -> list[nn.Module]:
    """The blocks of the towers: the members of every list or sequence of sub-modules of one class, innermost
    ones alone (a lone member within another counts as part of that).

    FSDP gathers and frees each as one, and Muon updates the matrices in them.
    """
    found: list[nn.Module] = []
    within: set[nn.Module] = set()
    for module in clip.modules():
        members = list(module.children())
        kinds = {type(member) for member in members}
        if not isinstance(module, nn.Sequential | nn.ModuleList) or len(kinds) != 1:
            continue
        stages = kinds <= {nn.Sequential, nn.ModuleList}  # whose blocks come later
        if stages or not any(members[0].children()) or (len(members) == 1 and module in within):
            continue
        found = [outer for outer in found if module not in set(outer.modules())] + members
        within.update(inner for member in members for inner in member.modules())
    return found
