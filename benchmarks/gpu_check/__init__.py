"""A GPU's visit: everything that only a GPU can tell, in one command of at most nine minutes.

__main__      the command, and the process of one stage
stages        the plan: every stage, its seconds and its cases, as data
runner        processes, limits, what is written
watch         clocks, power and throttling meanwhile
smoke, kernels, steps, commands, rivals, large      the work of the stages
forms         from what was measured to the table that the package reads
"""
