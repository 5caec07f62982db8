"""A slow transcription of the update rule: one tensor, lists of Python floats, one coordinate after the other.

Written from the description of the rule, apart from the tensor code, so that a slip in one does not repeat itself in
the other. Everything is float64; nothing is fused, batched or cached.
"""

from __future__ import annotations

import math


def bounded(x, bound):
    """Between 1/bound and bound, 1 at 0, f(-x) = 1/f(x)."""
    squashed = x / (1.0 + abs(x))
    a = (bound - 1.0) / (bound + 1.0)
    return (1.0 + a * squashed) / (1.0 - a * squashed)


def clamp(x, low, high):
    return min(max(x, low), high)


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


def rms(values):
    return math.sqrt(sum(x * x for x in values) / max(len(values), 1))


def dot(row, values):
    return sum(w * x for w, x in zip(row, values, strict=True))


def transposed(a):
    return [list(column) for column in zip(*a, strict=True)]


def product(a, b):
    return [[dot(row, column) for column in transposed(b)] for row in a]


class ReferenceTensor:
    """The state of one tensor and its update.

    Args:
        policy: weights and configuration.
        shape: of the tensor; coordinates come in its contiguous order.
    """

    def __init__(self, policy, shape):
        self.config = policy.config
        self.weights = {name: weight.double().tolist() for name, weight in policy.weights().items()}
        self.shape = tuple(shape)
        n = math.prod(self.shape)
        self.t = 0
        self.m, self.v = [0.0] * n, [0.0] * n
        self.h = [[0.0] * self.config.hidden_size for _ in range(n)]
        self.cosine_fast = self.cosine_slow = self.pace = self.age = 0.0

    def step(self, p, g, *, lr, betas, eps, weight_decay):
        """New parameters from ``p`` and gradient ``g``, both lists."""
        self.t += 1
        t, n, config = self.t, len(p), self.config
        beta1, beta2 = betas
        previous_m = self.m
        self.m = [beta1 * self.m[i] + (1.0 - beta1) * g[i] for i in range(n)]
        self.v = [beta2 * self.v[i] + (1.0 - beta2) * g[i] ** 2 for i in range(n)]
        u, b, r = [], [], []
        for i in range(n):
            denominator = math.sqrt(self.v[i] / (1.0 - beta2**t)) + eps
            u.append(g[i] / denominator)
            b.append(self.m[i] / (1.0 - beta1**t) / denominator)
            r.append(previous_m[i] / denominator)
        h1 = [h[0] for h in self.h]

        self.average_cosines(u, r)
        self.age = self.age + 1.0 if config.age_rate > 0.0 else float(t)
        context = self.context(p, u, b, h1)
        said = dot(self.weights["pace"][0], context) if config.pace_rate > 0.0 else 0.0
        if config.pace_rate > 0.0 or config.pace_gain > 0.0:
            change = min(config.pace_gain * self.cosine_fast + config.pace_rate * said, config.pace_growth)
            self.pace += change if any(u) else 0.0  # of a tensor that rests nothing is heard
            self.pace = clamp(self.pace, -config.pace_bound, config.pace_bound)
        if config.age_rate > 0.0:
            kept = math.exp(-config.age_rate * max(0.0, dot(self.weights["age"][0], context)))
            self.age = 1.0 + kept * (self.age - 1.0)
            self.pace *= kept
            context = self.context(p, u, b, h1)
        if config.decay_rate > 0.0:
            own = config.decay_rate * max(0.0, dot(self.weights["decay"][0], context))
            weight_decay += own * min(lr / 1e-3, 1.0)  # falls with the square of small learning rates
        scale, weight_b, weight_u, kappa, weight_h = self.head(context)
        scale *= math.exp(self.pace)
        rates = self.rates(context)

        update = []
        rms_b, rms_h, rms_u, rms_p = rms(b), rms(h1), rms(u), rms(p)
        for i in range(n):
            x = self.features(b[i], rms_b, h1[i], rms_h, u[i], rms_u, p[i], rms_p)
            if config.cell == "gated":
                d = scale * (weight_b * b[i] + weight_u * u[i])
                for j in range(config.hidden_size):
                    factor = bounded(dot(self.weights["gate_features"][j], x), config.gate_bound)
                    z = min(1.0, max(1.0 / self.age, rates[j] * factor))
                    self.h[i][j] += z * (u[i] - self.h[i][j])
                    d += scale * weight_h[j] * self.h[i][j]
                d *= bounded(dot(self.weights["amplitude"], x), config.amplitude_bound)
            else:
                self.h[i] = self.gru(x, self.h[i])
                amplitude, of_b, of_u = (
                    bounded(dot(row, self.h[i]), config.amplitude_bound) for row in self.weights["gru_output"]
                )
                d = scale * amplitude * (weight_b * b[i] * of_b + weight_u * u[i] * of_u)
            if d * u[i] < 0.0:
                d *= 1.0 - kappa
            update.append(d)
        update = self.orthogonalized(update)
        return [p[i] - lr * weight_decay * p[i] - lr * update[i] for i in range(n)]

    def orthogonalized(self, d):
        config, share = self.config, self.config.orthogonal
        rows = self.shape[0] if len(self.shape) >= 2 else 1
        length = math.sqrt(sum(x * x for x in d))
        if share == 0.0 or rows < 2 or len(d) // rows < 2 or length == 0.0:
            return d
        columns = len(d) // rows
        if rows >= config.orthogonal_aspect * columns:
            return d
        matrix = [d[i * columns : (i + 1) * columns] for i in range(rows)]
        polar = self.in_blocks(transposed(matrix)) if rows > columns else self.in_blocks(matrix)
        o = [x for line in (transposed(polar) if rows > columns else polar) for x in line]
        of_o = math.sqrt(sum(x * x for x in o))
        mixed = [(1.0 - share) * x + share * y * length / of_o for x, y in zip(d, o, strict=True)]
        of_mixed = math.sqrt(sum(x * x for x in mixed))
        cosine = dot(d, o) / (length * of_o)
        length *= min(1.0, cosine / config.orthogonal_damping_threshold) ** (config.orthogonal_damping * share)
        return [x * length / of_mixed if y != 0.0 else 0.0 for x, y in zip(mixed, d, strict=True)]

    def in_blocks(self, matrix):
        """The rows in blocks of equal size, each brought near to orthogonal by itself."""
        blocks = math.ceil(len(matrix) / self.config.orthogonal_block) if self.config.orthogonal_block else 1
        size = math.ceil(len(matrix) / blocks)
        if blocks > 1:
            size = min(8 * math.ceil(size / 8), self.config.orthogonal_block)
        return [row for i in range(0, len(matrix), size) for row in self.polar(matrix[i : i + size])]

    def polar(self, matrix):
        length = math.sqrt(sum(x * x for line in matrix for x in line))
        matrix = [[x / length for x in line] for line in matrix]
        first, third, fifth = self.config.orthogonal_coefficients
        for _ in range(self.config.orthogonal_iterations):
            square = product(matrix, transposed(matrix))
            once, twice = product(square, matrix), product(square, product(square, matrix))
            matrix = [
                [first * x + third * y + fifth * z for x, y, z in zip(*lines, strict=True)]
                for lines in zip(matrix, once, twice, strict=True)
            ]
        return matrix

    def average_cosines(self, u, r):
        both = math.sqrt(sum(x * x for x in u)) * math.sqrt(sum(x * x for x in r))
        cosine = dot(u, r) / both if both > 0.0 else 0.0
        fast, slow = self.config.cosine_decays
        self.cosine_fast = fast * self.cosine_fast + (1.0 - fast) * cosine
        self.cosine_slow = slow * self.cosine_slow + (1.0 - slow) * cosine

    def context(self, p, u, b, h1):
        """The inputs of the tensor head."""
        config = self.config
        fan_ratio = math.log(self.shape[0] / self.shape[1]) if len(self.shape) >= 2 else 0.0
        mean_abs_b = sum(abs(x) for x in b) / len(b)
        sparsity = mean_abs_b / rms(b) if any(b) else 0.0
        rows = self.shape[0] if len(self.shape) == 2 and self.shape[0] >= 16 * self.shape[1] else 1
        rare_rows = math.log(max(rows, 1000) / 1000) * min(-math.log(clamp(sparsity, 1e-3, 1.0)), 1.0)
        small = 0.0
        if rows >= 256 and self.shape[1] >= 16:
            small = clamp(-math.log(max(rms(p), 1e-4)), 0.0, 3.0)
        large, rows_and_columns = 0.0, (self.shape[0], len(p) // self.shape[0]) if self.shape else (1, 1)
        if len(self.shape) >= 2 and rows_and_columns[0] < 8 * rows_and_columns[1]:
            large = clamp(math.log2(min(rows_and_columns) / 64.0), 0.0, 1.0)
        values = {
            "bias": 1.0,
            "log_age": math.log(self.age),
            "log_numel": math.log(len(p)),
            "is_vector": 1.0 if len(self.shape) <= 1 else 0.0,
            "is_convolution": 1.0 if len(self.shape) >= 3 else 0.0,
            "log_fan_ratio": fan_ratio,
            "log_rms_p": math.log(max(rms(p), 1e-4)),
            "cosine_fast": self.cosine_fast,
            "cosine_slow": self.cosine_slow,
            "log_rms_b": math.log(max(rms(b), 1e-4)),
            "log_rms_h": math.log(max(rms(h1), 1e-4)),
            "log_rms_u": math.log(max(rms(u), 1e-4)),
            "log_sparsity": math.log(clamp(sparsity, 1e-3, 1.0)),
            "log_rare_rows": rare_rows,
            "log_small_embedding": max(small - rare_rows, 0.0),
            "is_large": large,
        }
        bound = config.context_bound
        return [
            clamp((values[name] - center) / scale, -bound, bound)
            for name, center, scale in zip(config.context, config.context_center, config.context_scale, strict=True)
        ]

    def head(self, context):
        """Step scale, weights of b and u, kappa, weights of the hidden units."""
        config = self.config
        logs = [config.head_bound * math.tanh(dot(row, context) / config.head_bound) for row in self.weights["head"]]
        weight_h = [w * math.exp(l) for w, l in zip(config.hidden_weights, logs[4:], strict=True)]
        if config.caution in (0.0, 1.0):
            kappa = config.caution
        else:
            kappa = sigmoid(math.log(config.caution / (1.0 - config.caution)) + logs[3])
        return (
            config.step_scale * math.exp(logs[0]),
            config.momentum_weight * math.exp(logs[1]),
            config.gradient_weight * math.exp(logs[2]),
            kappa,
            weight_h,
        )

    def rates(self, context):
        """The gates before a coordinate's features have their say."""
        config = self.config
        if config.cell != "gated":
            return []
        rates = [k / (self.age + k - 1.0) for k in config.windows] + list(config.rates)
        shifts = [bounded(dot(row, context), config.gate_bound) for row in self.weights["gate_context"]]
        return [rate * shift for rate, shift in zip(rates, shifts, strict=True)]

    def features(self, b, rms_b, h, rms_h, u, rms_u, p, rms_p):
        bound = self.config.feature_bound

        def relative(x, size):
            return clamp(x / size, -bound, bound) if x != 0.0 else 0.0

        n_b, n_h, n_u, n_p = relative(b, rms_b), relative(h, rms_h), relative(u, rms_u), relative(p, rms_p)
        even = self.config.cell == "gru"  # a GRU's hidden units have no sign to be compared with
        table = {
            "abs_b": abs(n_b),
            "abs_h": abs(n_h),
            "abs_u": abs(n_u),
            "b_h": (abs(n_b) if even else n_b) * n_h,
            "u_b": n_u * n_b,
            "u_h": (abs(n_u) if even else n_u) * n_h,
            "p_b": n_p * n_b,
        }
        return [table[name] for name in self.config.features]

    def gru(self, x, h):
        """Rows of the weights: reset gates, update gates, candidates."""
        size, w = len(h), self.weights
        from_x = [dot(row, x) for row in w["gru_input"]]
        from_h = [dot(row, h) for row in w["gru_hidden"]]
        new = []
        for j in range(size):
            reset = sigmoid(from_x[j] + from_h[j] + w["gru_bias"][j])
            z = sigmoid(from_x[size + j] + from_h[size + j] + w["gru_bias"][size + j])
            last = 2 * size + j
            candidate = math.tanh(from_x[last] + reset * from_h[last] + w["gru_bias"][last])
            new.append((1.0 - z) * h[j] + z * candidate)
        return new
