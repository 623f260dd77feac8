"""Lightning modules."""

from diopt_lightning.modules.bilevel import BilevelModule
from diopt_lightning.modules.instruction_optimization import InstructionOptimization
from diopt_lightning.modules.instruction_tuning import InstructionTuning
from diopt_lightning.modules.parameter_groups import ParameterGroup
from diopt_lightning.modules.schedules import LinearWithWarmup

__all__ = ["BilevelModule", "InstructionOptimization", "InstructionTuning", "LinearWithWarmup", "ParameterGroup"]
