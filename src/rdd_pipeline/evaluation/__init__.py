"""How good a network is: confusion matrix, whole-image prediction, figures, cost."""
