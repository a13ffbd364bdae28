"""What each auxiliary objective is worth to the main output: Shapley values of trained networks.

A network is trained with every subset of its auxiliary objectives, from the same weights and with
the same batches; what an objective adds to the metric of the main output, averaged over all orders
in which the objectives may come, is its Shapley value (Shapley, *A Value for n-Person Games*,
1953). The values add up to what all objectives together gain. Weights are data of the program that
trains: it is compiled once.
"""
