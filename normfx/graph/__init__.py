"""Questions about graphs: what shares memory, what is written, which modes hold, what computes where."""
