// classify.cpp: a compiled model behind a small C++ class that owns it. Opened at run time:
//
//     ingot compile digits.onnx --target native -o digits.so
//     cc -std=c11 -O2 -I$RUNTIME -c $RUNTIME/open.c -o open.o
//     c++ -std=c++17 -O2 -I$RUNTIME classify.cpp open.o -o classify -ldl -lpthread
//     ./classify digits.so < ../three.txt
//
// or as a part of the program, by linking the static library; then there is nothing to open:
//
//     ingot compile digits.onnx --target native --emit a -o libdigits.a
//     ingot compile digits.onnx --target native --emit c-header -o digits.h
//     c++ -std=c++17 -O2 -I. -DLINKED classify.cpp libdigits.a -o classify_static -lm -lpthread
//     ./classify_static < ../three.txt
//
// $RUNTIME is the folder with ingot.h and open.c; ../README.md says where that is.
#ifdef LINKED
#include "digits.h"
#else
#include "ingot_open.h"
#endif

#include <algorithm>
#include <exception>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// A model with one float32 input and one float32 output. Errors become exceptions.
class Classifier {
public:
    explicit Classifier(const ingot_api *api) : api_(api), model_(nullptr, api->destroy) {
        std::string error(256, '\0');
        const ingot_options options = {sizeof(ingot_options), 0, nullptr, 0, error.data(), error.size()};
        ingot_model *model = nullptr;
        if (api_->create(&options, &model) != INGOT_OK) throw std::runtime_error(error.c_str());
        model_.reset(model);
        const ingot_model_info *info = nullptr;
        api_->describe(&info);
        in_ = info->inputs;
        out_ = info->outputs;
        if (info->n_inputs != 1 || info->n_outputs != 1 || in_->dtype != INGOT_FLOAT32 || out_->dtype != INGOT_FLOAT32)
            throw std::runtime_error("this program is for models with one float32 input and output");
    }

    std::size_t input_size() const { return in_->bytes / sizeof(float); }

    // The model checks the sizes: a vector of the wrong length is an error with a clear message.
    std::vector<float> operator()(std::vector<float> input) {
        std::vector<float> output(out_->bytes / sizeof(float));
        const ingot_tensor x = tensor(input, *in_), y = tensor(output, *out_);
        if (api_->run(model_.get(), &x, 1, &y, 1) != INGOT_OK) throw std::runtime_error(api_->last_error(model_.get()));
        return output;
    }

private:
    static ingot_tensor tensor(std::vector<float> &data, const ingot_tensor_info &info) {
        return {data.data(), data.size() * sizeof(float), info.dtype, info.ndim, info.shape, INGOT_CPU, 0};
    }

    const ingot_api *api_;
    std::unique_ptr<ingot_model, decltype(ingot_api::destroy)> model_;
    const ingot_tensor_info *in_ = nullptr, *out_ = nullptr;
};

static const ingot_api *find_model(int argc, char **argv) {
#ifdef LINKED
    (void)argc, (void)argv;
    return ingot_digits_api();
#else
    std::string error(256, '\0');
    const ingot_api *api = nullptr;
    if (argc != 2) throw std::runtime_error("usage: classify model.so < numbers.txt");
    if (ingot_open(argv[1], &api, error.data(), error.size()) != INGOT_OK) throw std::runtime_error(error.c_str());
    return api;
#endif
}

int main(int argc, char **argv) try {
    Classifier classifier(find_model(argc, argv));
    std::vector<float> input(classifier.input_size());
    for (float &value : input)
        if (!(std::cin >> value)) throw std::runtime_error("the model needs " + std::to_string(input.size()) + " numbers");
    const std::vector<float> scores = classifier(input);
    const auto best = std::max_element(scores.begin(), scores.end());
    std::cout << "class " << best - scores.begin() << "  score " << *best << "\n";
} catch (const std::exception &error) {
    std::cerr << "classify: " << error.what() << "\n";
    return 1;
}
