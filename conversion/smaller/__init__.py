"""
Fewer key and value heads: the low-rank head factors that lose least on the activations of a text.

A converted Llama is non-contextual TPA of rank G, its number of key/value heads. RoPE rotates the feature axis alone,
the same way in every head, so it commutes with every mixture of heads (Theorem 3.1), and, feature pair by feature pair,
with every complex factor, since RoPE itself multiplies a pair, read as a complex number, by one. Keys of rank R < G are
therefore sought among

    K_i[f] = z_i[f] sum_r A[r, i] b_r[f],        b_r[f] = sum_g M[f, r, g] K_g[f]

for head i and feature pair f: M goes into the weights of B_K, conj(z) into those of the queries, A is the constant
factor. Values are not rotated and allow more, a matrix for each head that goes into the output projection:

    V_i = U_i sum_r A[r, i] b_r,                  b = M V

Both are fitted by alternating least squares on second moments of the activations. The error of a key is weighted by the
power of the queries that read it, the error of a value by what the output projection makes of it, after attention has
averaged the values. The mean of the keys under a query's probabilities is subtracted first, since a softmax does not see
it: in SmolLM2-135M it is 80% to 95% of their power, so weighted. Small relative errors of B are part of the loss; without
them heads come out as small differences of large B, which rounding to half precision damages and from which training
diverges. Nothing is rotated differently, so RoPE stays exact at every position.
"""
