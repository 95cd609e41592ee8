"""What a policy permits at worst, proved before it runs.

report = check(TABLE, AgentConfig(max_iterations=5))
report.verdict, report.bound("model_calls").at_most, report.certificate
print(report)
"""

from agent_fsm.check.checking import check
from agent_fsm.check.report import Bound, Certificate, Report, Verdict
from agent_fsm.check.verifier import verify
from agent_fsm.check.witness import Lasso

__all__ = ["Bound", "Certificate", "Lasso", "Report", "Verdict", "check", "verify"]
