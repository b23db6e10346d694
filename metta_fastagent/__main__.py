"""`python -m metta_fastagent` says what runs on this machine and why."""

from metta_fastagent import explain

print(explain())
