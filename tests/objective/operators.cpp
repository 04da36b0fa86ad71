// Operators for test_cpp_operators.py, each x to its cube, as extensions register theirs.
#include <torch/library.h>
#include <torch/csrc/autograd/custom_function.h>
#include <ATen/ATen.h>
using torch::autograd::AutogradContext; using torch::autograd::variable_list; using at::Tensor;
// A kernel, into which autograd does not look.
static Tensor kernel(const Tensor& x, const Tensor& g, int power) {
  auto a = x.detach().contiguous(); auto b = g.detach().contiguous(); auto out = at::empty_like(a);
  auto p = a.data_ptr<double>(); auto q = b.data_ptr<double>(); auto r = out.data_ptr<double>();
  for (int64_t i = 0; i < a.numel(); i++) r[i] = power == 3 ? p[i]*p[i]*p[i] : 3*p[i]*p[i]*q[i];
  return out;
}
Tensor cube(const Tensor& x) { return kernel(x, x, 3); }
Tensor cube_backward(const Tensor& g, const Tensor& x) { return kernel(x, g, 2); }
static Tensor call_cube(const Tensor& x) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("lla_cpp::cube", "").typed<Tensor(const Tensor&)>();
  at::AutoDispatchBelowADInplaceOrView guard; return op.call(x);
}
static Tensor call_backward(const Tensor& g, const Tensor& x) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("lla_cpp::cube_backward", "").typed<Tensor(const Tensor&, const Tensor&)>();
  return op.call(g, x);
}
struct ByOperator : torch::autograd::Function<ByOperator> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) { ctx->save_for_backward({x}); return call_cube(x); }
  static variable_list backward(AutogradContext* ctx, variable_list g) { return {call_backward(g[0], ctx->get_saved_variables()[0])}; }
};
struct ByKernel : torch::autograd::Function<ByKernel> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) { ctx->save_for_backward({x}); return kernel(x, x, 3); }
  static variable_list backward(AutogradContext* ctx, variable_list g) { return {cube_backward(g[0], ctx->get_saved_variables()[0])}; }
};
struct ByGraph : torch::autograd::Function<ByGraph> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) { ctx->save_for_backward({x}); return kernel(x, x, 3); }
  static variable_list backward(AutogradContext* ctx, variable_list g) { auto x = ctx->get_saved_variables()[0]; return {3 * x * x * g[0]}; }
};
struct ByDetached : torch::autograd::Function<ByDetached> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) { ctx->save_for_backward({x}); return kernel(x, x, 3); }
  static variable_list backward(AutogradContext* ctx, variable_list g) { auto x = ctx->get_saved_variables()[0].detach(); return {3 * x * x * g[0]}; }
};
Tensor by_operator(const Tensor& x) { return ByOperator::apply(x); }
Tensor by_kernel(const Tensor& x) { return ByKernel::apply(x); }
Tensor by_graph(const Tensor& x) { return ByGraph::apply(x); }
Tensor by_detached(const Tensor& x) { return ByDetached::apply(x); }
TORCH_LIBRARY(lla_cpp, m) {
  m.def("cube(Tensor x) -> Tensor"); m.def("cube_backward(Tensor g, Tensor x) -> Tensor");
  m.def("by_operator(Tensor x) -> Tensor"); m.def("by_kernel(Tensor x) -> Tensor"); m.def("by_graph(Tensor x) -> Tensor"); m.def("by_detached(Tensor x) -> Tensor"); m.def("alone(Tensor x) -> Tensor");
}
TORCH_LIBRARY_IMPL(lla_cpp, CPU, m) { m.impl("cube", &cube); m.impl("cube_backward", &cube_backward); m.impl("alone", &cube);
  m.impl("by_operator", &cube); m.impl("by_kernel", &cube); m.impl("by_graph", &cube); m.impl("by_detached", &cube); }
TORCH_LIBRARY_IMPL(lla_cpp, Autograd, m) { m.impl("by_operator", &by_operator); m.impl("by_kernel", &by_kernel); m.impl("by_graph", &by_graph); m.impl("by_detached", &by_detached); }
