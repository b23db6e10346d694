"""Checks for agents of your own: `check_agent` for one agent, `compare_agents` for one before and after migration.

Both work on deep copies and on forked random number generators (CPU and CUDA), so that the agents, their memory and the
program's random numbers stay as they were.
"""

from metta_fastagent.testing._check_agent import AgentCheckError, AgentReport, CheckResult, check_agent
from metta_fastagent.testing._compare_agents import AgentsDifferError, compare_agents

__all__ = ["AgentCheckError", "AgentReport", "AgentsDifferError", "CheckResult", "check_agent", "compare_agents"]
