def load_pretrained():
  pass
