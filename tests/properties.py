"""How the suite runs hypothesis: few examples, the same ones every time."""

import hypothesis

few = hypothesis.settings(
  max_examples=25,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)
