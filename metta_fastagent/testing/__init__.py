"""Checks for your own agents: `check_agent` for one agent, `compare_agents` for one before and after migration.

Both work on deep copies and forked random number generators (CPU and CUDA), so the agents, their memory and the
program's random state do not change.
"""

from metta_fastagent.testing._check_agent import AgentCheckError, AgentReport, CheckResult, check_agent
from metta_fastagent.testing._compare_agents import AgentsDifferError, compare_agents

__all__ = ["AgentCheckError", "AgentReport", "AgentsDifferError", "CheckResult", "check_agent", "compare_agents"]
