"""Position embeddings of a picture's grid, resized for another image size."""

from __future__ import annotations

import numpy as np

# Keys' cubic kernel with a = -3/4, as PyTorch resizes; jax.image and most papers use -1/2, which gives other numbers.
_SHARPNESS = -0.75


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel (1981, equation 4) at distances of at most 2."""
    a, x = _SHARPNESS, np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, far)


def resize_matrix(old: int, new: int) -> np.ndarray:
    """The matrix ``[new, old]`` float64 that resizes a line of ``old`` samples to ``new`` by bicubic interpolation.

    As ``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)``: pixel centres are aligned, no
    smoothing when the line shrinks, and beyond the border the outermost sample is repeated.
    """
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    base = np.floor(centre).astype(int)
    matrix = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        sample = base + offset
        np.add.at(matrix, (np.arange(new), np.clip(sample, 0, old - 1)), _cubic(centre - sample))
    return matrix


def interpolate_positions(table: np.ndarray, old_grid: int, new_grid: int) -> np.ndarray:
    """Resizes a vision tower's position embeddings, as transformers' ``interpolate_pos_encoding`` does.

    Args:
        table: ``[1 + old_grid * old_grid, width]`` float32; the first row belongs to the class token and stays.
        old_grid: patches along one side of the picture that the table was made for.
        new_grid: patches along one side of the new picture.

    Returns:
        ``[1 + new_grid * new_grid, width]`` float32.
    """
    if old_grid == new_grid:
        return table
    matrix = resize_matrix(old_grid, new_grid)
    grid = table[1:].reshape(old_grid, old_grid, -1)
    resized = np.einsum("yi,xj,ijc->yxc", matrix, matrix, grid, optimize=True)
    return np.concatenate([table[:1], resized.reshape(new_grid * new_grid, -1).astype(table.dtype)])
