"""Policies: what modifies a preset's rule, as torch functions that run on the device.

To write a policy, pass a function of `(view, choice)` to `generate(policy=...)`, or subclass `Policy` if the policy
needs memory between steps. This function writes the two leftmost masks in every step:

    def leftmost_two(view, choice):
        return view.best(torch.full_like(view.step, 2), score=-view.position.float())

    dlm_fast.generate(model, prompts, preset="llada", policy=leftmost_two)
"""

from .base import Function, Policy, as_policies
from .exits import Prophet, Sched
from .heads import CommitHead, FilterHead, Head, load_head, save_head
from .history import ConsistentTrajectory, Credit, KLStability
from .indel import InsertDelete
from .learned import LearnedCommit, LearnedFilter
from .refresh import EntropyRefresh
from .revise import Backtrack, JointThreshold, RunningConfidence, Wino
from .select import AdaptiveThreshold, CertaintyPrior, LocalLeap, NearBest
from .setting import Sampling, Setting
from .view import Choice, Lanes, View

__all__ = [
    "AdaptiveThreshold",
    "Backtrack",
    "CertaintyPrior",
    "Choice",
    "CommitHead",
    "ConsistentTrajectory",
    "Credit",
    "EntropyRefresh",
    "FilterHead",
    "Function",
    "Head",
    "InsertDelete",
    "JointThreshold",
    "KLStability",
    "Lanes",
    "LearnedCommit",
    "LearnedFilter",
    "LocalLeap",
    "NearBest",
    "Policy",
    "Prophet",
    "RunningConfidence",
    "Sampling",
    "Sched",
    "Setting",
    "View",
    "Wino",
    "as_policies",
    "load_head",
    "save_head",
]
