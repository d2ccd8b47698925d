"""The planner: what a device's memory is divided into, and how many tokens of KV that makes. No torch.

One noun a file: `division` is the arithmetic, which the engine uses too; `devices` and `published` are
tables of hardware and of models; `shape` turns a model's config.json into bytes; `precision` says what an
element of KV takes; `serving` answers an operator's question with a plan; `alternatives` says what would
change it.
"""

from kvengine.kv.plan.division import Plan, StepMemory, StepSize, plan

__all__ = ["Plan", "StepMemory", "StepSize", "plan"]
