"""Behind `dist_lm.launch`: compose the configuration, plan the stages, run one, sum up."""
