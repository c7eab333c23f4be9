def verify(gm, stage): pass
