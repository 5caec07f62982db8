// The tensor head over K tensors. native_library.py fills the gaps with what the rule says.
extern "C" void %(name)s(int64_t K, const double* W, const double* numel, const double* context, const double* sums,
                         const double* step, const int64_t* which, const int64_t* addresses, double* seen,
                         double* coefficients) {
  for (int64_t k = 0; k < K; k++) {
    const int64_t* q = addresses + k * %(keys)d;
    %(loads)s
    %(statements)s
    %(writes)s
    %(stores)s
  }
}
