"""Kernels for KVPO-style reinforcement learning of streaming autoregressive video generators."""

from kvpo_kernels.doctor import explain as explain
from kvpo_kernels.errors import BackendUnavailable as BackendUnavailable
from kvpo_kernels.errors import KvpoError as KvpoError
from kvpo_kernels.history.eviction import EvictionPolicy as EvictionPolicy
from kvpo_kernels.history.eviction import TopScored as TopScored
from kvpo_kernels.history.eviction import Window as Window
from kvpo_kernels.history.eviction import frame_attention_mass as frame_attention_mass
from kvpo_kernels.history.eviction import text_relevance as text_relevance
from kvpo_kernels.history.planning import HistoryRouting as HistoryRouting
from kvpo_kernels.history.planning import RoutingPlan as RoutingPlan
from kvpo_kernels.history.planning import candidate_frames as candidate_frames
from kvpo_kernels.history.planning import eligible_starts as eligible_starts
from kvpo_kernels.history.planning import plan_history_routing as plan_history_routing
from kvpo_kernels.history.pool import FramePool as FramePool
from kvpo_kernels.history.route_table import RouteTable as RouteTable
from kvpo_kernels.history.slots import PreparedSlots as PreparedSlots
from kvpo_kernels.history.slots import Slot as Slot
from kvpo_kernels.history.slots import Slots as Slots
from kvpo_kernels.history.timeline import Timeline as Timeline
from kvpo_kernels.ops.advantages import anchor_advantages as anchor_advantages
from kvpo_kernels.ops.advantages import fuse_advantages as fuse_advantages
from kvpo_kernels.ops.branch_policy_loss import BranchPolicyLoss as BranchPolicyLoss
from kvpo_kernels.ops.branch_policy_loss import ContrastiveObjective as ContrastiveObjective
from kvpo_kernels.ops.branch_policy_loss import branch_policy_loss as branch_policy_loss
from kvpo_kernels.ops.norm_rope import RopeTable as RopeTable
from kvpo_kernels.ops.norm_rope import qk_norm_rope as qk_norm_rope
from kvpo_kernels.ops.norm_rope import qk_norm_rope_write as qk_norm_rope_write
from kvpo_kernels.ops.routed_attention import routed_attention as routed_attention
from kvpo_kernels.ops.store_frames import quantize_frames as quantize_frames
from kvpo_kernels.ops.tve_grpo import TveGrpoLoss as TveGrpoLoss
from kvpo_kernels.ops.tve_grpo import tve_grpo_loss as tve_grpo_loss
from kvpo_kernels.ops.velocity_energy import TrajectoryEnergies as TrajectoryEnergies
from kvpo_kernels.ops.velocity_energy import (
    trajectory_velocity_energy as trajectory_velocity_energy,
)
from kvpo_kernels.ops.velocity_energy import velocity_gradient as velocity_gradient
from kvpo_kernels.ops.velocity_energy import velocity_step_weights as velocity_step_weights
