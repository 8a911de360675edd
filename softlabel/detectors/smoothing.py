"""Online label smoothing: class targets that a student makes from its own correct predictions."""

import torch


class OnlineSmoothing:
    """For each class, the distribution over all classes that the student predicted where it was right, last epoch.

    Zhang et al., "Delving Deep into Label Smoothing" (arXiv:2011.12562), where these are means of softmax outputs. In
    this form for sigmoids, the sigmoids of all predictions that are assigned to an object of class k and score k
    highest are summed, and the sum is divided by its own total: that makes it a distribution again, whatever the level
    of a score expresses besides the class. Until a class has been predicted correctly once, its row is one-hot; after
    an epoch in which it never is, its row stays as it was.

    Args:
        share: In [0, 1), the share of the target that comes from here; the paper's is 0.5.
        num_classes: K.
    """

    def __init__(self, share: float, num_classes: int) -> None:
        self._share = share
        self.table = torch.eye(num_classes)
        """(K, K) float32, rows that add up to 1."""
        self.sums = torch.zeros(num_classes, num_classes, dtype=torch.float64)
        """(K, K), of the current epoch."""

    def mixed(self, vectors: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        """Class targets (T, K) of objects with classes (T,), mixed with the student's own distributions of those."""
        return (1 - self._share) * vectors + self._share * self.table.to(vectors)[class_ids]

    def see(self, scores: torch.Tensor, class_ids: torch.Tensor) -> None:
        """Add up predictions (N, K), sigmoids, that are assigned to objects with classes (N,)."""
        right = scores.argmax(1) == class_ids
        self.sums = self.sums.to(scores.device).index_add(0, class_ids[right], scores[right].double())

    def end_epoch(self, sums: torch.Tensor) -> None:
        """Renew the table from the sums over all ranks."""
        totals = sums.sum(1, keepdim=True)
        renewed = (sums / totals.clamp(min=1e-12)).float()
        self.table = torch.where(totals > 0, renewed, self.table.to(sums.device))
        self.sums = torch.zeros_like(sums)
