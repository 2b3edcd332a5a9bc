"""Networks of DeepLab v3."""
