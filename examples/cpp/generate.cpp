// Generates with a folder that `spark-optimize MODEL -o DIR --aot` has written; there is no Python.
//
//   generate DIR COUNT ID [ID...]     prints COUNT ids that follow the given ones, the most probable each time
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>
#include <memory>

#include "folder.h"

using Package = torch::inductor::AOTIModelPackageLoader;

// A package that computes with these weights, of which it takes no copy.
std::unique_ptr<Package> load(const std::string& folder, const Json& program, const Weights& weights) {
  auto package = std::make_unique<Package>(folder + "/" + program.at("package").text);
  Weights all, wanted;
  const std::vector<Json>& names = program.at("weights").items;
  for (size_t i = 0; i < names.size(); ++i) all["w" + std::to_string(i)] = weights.at(names[i].text);
  for (const std::string& name : package->get_constant_fqns()) wanted[name] = all.at(name);
  package->load_constants(wanted, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  return package;
}

int main(int count, char** words) try {
  if (count < 4) throw std::runtime_error("usage: generate DIR COUNT ID [ID...]");
  const std::string folder = words[1];
  if (!dlopen((folder + "/libspark.so").c_str(), RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  const Json manifest = read_json(folder + "/manifest.json");
  if (manifest.at("batch").number() != 1) throw std::runtime_error("the folder is of another batch than 1");
  const Weights weights = read_weights(folder + "/model.safetensors");
  const auto prefill = load(folder, manifest.at("programs").at("prefill"), weights);
  const auto decode = load(folder, manifest.at("programs").at("decode"), weights);

  std::vector<at::Tensor> states;
  for (const Json& state : manifest.at("states").items) {
    states.push_back(at::zeros(state.at("shape").numbers(), dtype_of(state.at("dtype").text)));
  }
  std::vector<int64_t> ids;
  for (int i = 3; i < count; ++i) ids.push_back(std::stol(words[i]));
  int64_t position = 0, left = std::stol(words[2]);
  if (int64_t(ids.size()) + left - 1 > manifest.at("max_tokens").number()) {
    throw std::runtime_error("so many tokens do not fit: allowed are " + manifest.at("max_tokens").text);
  }
  for (; left > 0; --left) {
    const auto tokens = at::tensor(ids).unsqueeze(0);
    std::vector<at::Tensor> inputs = states;  // the tensors themselves, which a call changes
    inputs.insert(inputs.end(), {tokens, at::tensor({position}), at::tensor({int64_t(ids.size()) - 1})});
    const auto logits = (ids.size() > 1 ? prefill : decode)->run(inputs)[0];
    position += ids.size();
    ids = {logits.flatten().argmax().item<int64_t>()};
    std::cout << ids[0] << (left > 1 ? " " : "\n") << std::flush;
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
