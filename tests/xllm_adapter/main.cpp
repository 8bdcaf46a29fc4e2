// SPDX-License-Identifier: Apache-2.0
// The adapter's tests on the CPU, without Python.
extern "C" int run_xllm_adapter_tests(const char* device, int argc, char** argv);

int main(int argc, char** argv) {
  return run_xllm_adapter_tests("cpu", argc, argv);
}
