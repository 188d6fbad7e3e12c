"""The J1-J2 Heisenberg model, and variational Monte Carlo for its ground state.

    H = J1 Σ_<r r'> S_r · S_r' + J2 Σ_<<r r'>> S_r · S_r',   S = 1/2, periodic, total S^z = 0

    E_loc(σ) = Σ_σ' <σ|H|σ'> ψ(σ') / ψ(σ),   E = mean of E_loc over |ψ|²
    δθ = -X^T (X X^T + λ 1)^-1 f     stochastic reconfiguration in the space of samples (minSR)

X holds the centered log derivatives (real parts, then imaginary parts) over sqrt(samples), f the
centered local energies alike; the result is the natural gradient (X^T X + λ 1)^-1 X^T f.

Reference: Rende and Viteritti, 2024, arXiv:2405.18874 (J2/J1 = 0.5, learning rate 0.0075,
λ = 1e-4, 4096 samples); minSR: Rende et al., 2023, arXiv:2310.05715; Chen and Heyl, 2023,
arXiv:2302.01941. Energies here are those of spins 1/2; NetKet's Heisenberg model has four times as
much.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Complex, Float, Num

LogPsi = Callable[[jax.Array], jax.Array]
"""Spins [b, *shape] of ±1 to ln ψ [b], complex."""


@dataclasses.dataclass(frozen=True)
class J1J2:
    """The Hamiltonian on a periodic chain or square lattice.

    Attributes:
      shape: sites along each axis, (L,) or (L, L); each at least 3, so that bonds are distinct.
      j1, j2: couplings of nearest and next-nearest neighbors. Paper: J2 / J1 = 0.5.
    """

    shape: tuple[int, ...]
    j1: float = 1.0
    j2: float = 0.5

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 2) or min(self.shape) < 3:
            raise ValueError(
                f"J1J2: shape={self.shape} must be (L,) or (L, L) with at least 3 sites per axis."
            )

    @property
    def sites(self) -> int:
        """Number of spins."""
        return math.prod(self.shape)

    def bonds(self) -> tuple[np.ndarray, np.ndarray]:
        """All bonds (pairs [n, 2] of sites in row-major order, couplings [n])."""
        near, far = ([(1,)], [(2,)])
        if len(self.shape) == 2:
            near, far = [(1, 0), (0, 1)], [(1, 1), (1, -1)]
        place = np.indices(self.shape).reshape(len(self.shape), -1)
        pairs: dict[tuple[int, int], float] = {}
        for steps, coupling in ((near, self.j1), (far, self.j2)):
            for step in steps:
                moved = (place + np.array(step)[:, None]) % np.array(self.shape)[:, None]
                for i, j in enumerate(np.asarray(np.ravel_multi_index(tuple(moved), self.shape))):
                    pair = (min(i, int(j)), max(i, int(j)))
                    # a pair that is reached both ways (a chain of 4) is one bond
                    pairs[pair] = coupling
        return np.array([*pairs]), np.array([*pairs.values()])

    def basis(self) -> np.ndarray:
        """All configurations with total S^z = 0, [n, *shape] int8; the sites must be even."""
        n = self.sites
        if n % 2:
            raise ValueError(f"J1J2: {n} sites have no state with total S^z = 0.")
        ups = np.array([*itertools.combinations(range(n), n // 2)])
        states = -np.ones((len(ups), n), np.int8)
        np.put_along_axis(states, ups, np.int8(1), axis=1)
        return states.reshape(-1, *self.shape)

    def matrix(self) -> Any:
        """H in the basis, a `scipy.sparse` matrix; its lowest eigenvalue is the ground energy."""
        import scipy.sparse

        states = self.basis().reshape(-1, self.sites)
        powers = 1 << np.arange(self.sites, dtype=np.int64)
        codes = (states > 0) @ powers
        order = np.argsort(codes)
        index = np.arange(len(states))
        total = scipy.sparse.csr_matrix((len(states), len(states)))
        for (i, j), coupling in zip(*self.bonds(), strict=True):
            same = states[:, i] * states[:, j]
            total = total + scipy.sparse.diags(coupling * same / 4.0)
            apart = index[same < 0]
            target = order[np.searchsorted(codes[order], codes[apart] ^ (powers[i] | powers[j]))]
            values = np.full(len(apart), coupling / 2)
            total = total + scipy.sparse.csr_matrix((values, (apart, target)), total.shape)
        return total

    def ground_energy(self) -> float:
        """Lowest energy by exact diagonalization; for up to about 20 sites."""
        import scipy.sparse.linalg

        matrix = self.matrix()
        if matrix.shape[0] < 500:
            return float(np.linalg.eigvalsh(matrix.toarray())[0])
        return float(scipy.sparse.linalg.eigsh(matrix, k=1, which="SA")[0][0])

    def local_energy(self, log_psi: LogPsi, spins: Num[Array, "b ..."]) -> Complex[Array, " b"]:
        """E_loc of every configuration.

        Args:
          log_psi: of configurations [b, *shape].
          spins: [b, *shape] of ±1.

        Cost: one ln ψ per bond and configuration.
        """
        pairs, couplings = self.bonds()
        flat = spins.reshape(len(spins), -1)
        left, right = flat[:, pairs[:, 0]], flat[:, pairs[:, 1]]
        swapped = jnp.broadcast_to(flat[:, None], (*left.shape, flat.shape[1]))
        bond = np.arange(len(pairs))
        swapped = swapped.at[:, bond, pairs[:, 0]].set(right)
        swapped = swapped.at[:, bond, pairs[:, 1]].set(left)
        base = log_psi(spins)
        other = log_psi(swapped.reshape(-1, *spins.shape[1:])).reshape(left.shape)
        coupling = jnp.asarray(couplings, base.real.dtype)[None]
        diagonal = (coupling * (left * right).astype(coupling.dtype) / 4).sum(1)
        apart = jnp.where(left != right, coupling, jnp.zeros_like(coupling)) / 2
        ratios = jnp.exp(other - base[:, None])
        return diagonal.astype(base.dtype) + (apart.astype(base.dtype) * ratios).sum(1)


def sample(
    key: Any, log_psi: LogPsi, spins: Num[Array, "b ..."], sweeps: int = 1
) -> Num[Array, "b ..."]:
    """Metropolis chains that exchange two antiparallel spins near each other; S^z is kept.

    Args:
      key: of the proposals.
      log_psi: as in `J1J2.local_energy`; chains sample |ψ|².
      spins: the chains' states [b, *shape].
      sweeps: proposals are `sweeps` times the number of sites.

    Returns:
      The states after that.
    """
    shape = spins.shape[1:]
    n = math.prod(shape)
    place = np.indices(shape).reshape(len(shape), -1)
    apart = np.abs(place[:, :, None] - place[:, None, :])
    apart = np.minimum(apart, np.array(shape)[:, None, None] - apart).sum(0)
    pairs = jnp.asarray(np.argwhere(np.triu((apart > 0) & (apart <= 2))))

    def step(carry: tuple[jax.Array, jax.Array], key: Any) -> tuple[Any, None]:
        spins, value = carry
        pick, accept = jax.random.split(key)
        pair = pairs[jax.random.randint(pick, (len(spins),), 0, len(pairs))]
        flat = spins.reshape(-1, n)
        rows = jnp.arange(len(spins))[:, None]
        new = flat.at[rows, pair].set(flat[rows, pair[:, ::-1]]).reshape(spins.shape)
        proposed = log_psi(new)
        chance = jnp.exp(jnp.minimum(2 * (proposed - value).real, 0))
        taken = jax.random.uniform(accept, chance.shape, chance.dtype) < chance
        kept = taken.reshape(-1, *(1,) * len(shape))
        return (jnp.where(kept, new, spins), jnp.where(taken, proposed, value)), None

    carry = (spins, log_psi(spins))
    return jax.lax.scan(step, carry, jax.random.split(key, sweeps * n))[0][0]


def natural_gradient(
    log_psi: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    spins: Num[Array, "b ..."],
    energies: Complex[Array, " b"],
    *,
    probabilities: Float[Array, " b"] | None = None,
    damping: float = 1e-4,
) -> Any:
    """Direction of steepest descent of the energy in the metric of the states, by minSR.

    Args:
      log_psi: (params, spins [b, *shape]) -> ln ψ [b].
      params: real arrays.
      spins: samples of |ψ|², or all configurations with their `probabilities`.
      energies: local energies of `spins`.
      probabilities: None weighs all samples alike.
      damping: λ.

    Returns:
      X^T (X X^T + λ 1)^-1 f, shaped like `params`: subtract it, times the learning rate.

    Cost: O(b² P) for b samples and P parameters, instead of O(P³).
    """
    flat, unravel = ravel_pytree(params)

    def parts(vector: jax.Array, spin: jax.Array) -> jax.Array:
        value = log_psi(unravel(vector), spin[None])[0]
        return jnp.stack([value.real, value.imag])

    rows = jax.vmap(jax.jacrev(parts), (None, 0))(flat, spins)  # [b, 2, P]
    weights = jnp.full((len(spins),), 1 / len(spins), flat.dtype)
    weights = weights if probabilities is None else probabilities.astype(flat.dtype)
    rows = rows - jnp.einsum("b,bcp->cp", weights, rows)[None]
    centered = energies - (weights.astype(energies.dtype) * energies).sum()
    force = jnp.stack([centered.real, centered.imag], 1).astype(flat.dtype)
    root = jnp.sqrt(weights)[:, None]
    x = (rows * root[..., None]).reshape(-1, flat.size)
    force = (force * root).reshape(-1)
    gram = x @ x.T + damping * jnp.eye(len(x), dtype=x.dtype)
    return unravel(x.T @ jnp.linalg.solve(gram, force))
