"""The bounds of the numerics check, and their derivation."""

# The bounds, × the reference's own error. Both count roundings. A rank rounds where the reference does, and at most
# once more beside each: the parts of a sum that ranks share (of N parts, the errors together are those of one sum),
# and a norm before its weight is applied, which some models round but once. Twice as many independent errors of one
# size: our distance from the exact result is at most √2 × the reference's.
#
# RMS, in the stored dtype: √2 × (1 + 3/√n). Both are rms estimates from n positions; that of n independent samples
# deviates by 1/√(2n) of itself, the ratio of two by 1/√n, and 3 deviations are allowed. With 4 × LENGTH positions
# that is 1.72; at 52 positions it is 2. The reference in float32 counts as exact: its roundings are 2^-16 of those of
# bfloat16, 2^-13 of those of float16.
#
# TIMES, in float32: here the reference's error e is of the size of ours, e'. Measured is |e - e'|, with a deviation
# of √(1 + 2) of e's, against the largest |e| of the same logits, so √3 × the reference's own. The rest is for the
# order in which products are summed, which the kernel chooses by shape: K products in L lanes round K/L times one
# after another, errors grow by the root of it, and a narrower matrix or a single row (token by token, a rank's share)
# may get a quarter of the lanes, hence √4. √3 × √4 = 3.5; the largest of few values scatters by the rest.
RMS, TIMES = 2.0, 4.0
