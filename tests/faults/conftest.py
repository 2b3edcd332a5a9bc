import pytest


@pytest.fixture
def counts(record_property):
  """Counts of cases by kind and end, which are printed after all tests."""
  found = {}
  record_property('counts', found)
  return found
