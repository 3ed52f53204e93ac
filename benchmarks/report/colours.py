"""The colours of torch and of fusedopt in all plots."""

TORCH_COLOUR, OUR_COLOUR = "#b8b8b8", "#c2410c"
