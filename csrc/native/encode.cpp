#include "native/encode.hpp"

#include "wire/grpc.hpp"
#include "wire/protobuf.hpp"

namespace narsil::native {
namespace {

using wire::FieldType;

void put_tag(std::string& out, uint32_t field, uint64_t size) {
  wire::put_key(out, field, FieldType::LEN);
  wire::put_varint(out, size);
}

void put_text(std::string& out, uint32_t field, const std::string& text) {
  put_tag(out, field, text.size());
  out += text;
}

void put_uint(std::string& out, uint32_t field, uint64_t value) {
  if (!value) return;
  wire::put_key(out, field, FieldType::VARINT);
  wire::put_varint(out, value);
}

// Bytes of a length-delimited field whose number is below 16.
size_t field_size(size_t size) { return 1 + wire::varint_size(size) + size; }

void put_floats(std::string& out, const TaskScores& scores) {
  out.append(reinterpret_cast<const char*>(scores.values), 4 * scores.count);
}

std::string framed(size_t size) {
  std::string out;
  out.reserve(wire::PREFIX_SIZE + size);
  wire::put_prefix(out, size);
  return out;
}

}  // namespace

std::string encode_predictor(const std::vector<TaskScores>& scores) {
  const auto vector_size = [](const TaskScores& task) { return task.count ? field_size(4 * task.count) : 0; };
  const auto entry_size = [&](const TaskScores& task) {
    return field_size(task.task.size()) + field_size(vector_size(task));
  };
  size_t size = 0;
  for (const TaskScores& task : scores) size += field_size(entry_size(task));
  std::string out = framed(size);
  for (const TaskScores& task : scores) {
    put_tag(out, 1, entry_size(task));
    put_text(out, 1, task.task);
    put_tag(out, 2, vector_size(task));
    if (!task.count) continue;
    put_tag(out, 1, 4 * task.count);
    put_floats(out, task);
  }
  return out;
}

std::string encode_oip(const std::vector<TaskScores>& scores, const Model& model, const std::string& request_id) {
  static const std::string DATATYPE = "FP32";
  const auto text_size = [](const std::string& text) { return text.empty() ? 0 : field_size(text.size()); };
  const auto rows = [](const TaskScores& task) { return task.width ? task.count / task.width : task.count; };
  const auto shape_size = [&](const TaskScores& task) {
    return wire::varint_size(rows(task)) + (task.width ? wire::varint_size(task.width) : 0);
  };
  const auto tensor_size = [&](const TaskScores& task) {
    return text_size(task.task) + field_size(DATATYPE.size()) + field_size(shape_size(task));
  };
  size_t size = text_size(model.name) + text_size(model.version) + text_size(request_id);
  for (const TaskScores& task : scores) size += field_size(tensor_size(task)) + field_size(4 * task.count);
  std::string out = framed(size);
  const auto put = [&](uint32_t field, const std::string& text) {
    if (!text.empty()) put_text(out, field, text);
  };
  put(1, model.name);
  put(2, model.version);
  put(3, request_id);
  for (const TaskScores& task : scores) {
    put_tag(out, 5, tensor_size(task));
    put(1, task.task);
    put(2, DATATYPE);
    put_tag(out, 3, shape_size(task));
    wire::put_varint(out, rows(task));
    if (task.width) wire::put_varint(out, task.width);
  }
  for (const TaskScores& task : scores) {
    put_tag(out, 6, 4 * task.count);
    put_floats(out, task);
  }
  return out;
}

std::string encode_narsil(const std::vector<TaskScores>& scores, const Model& model, const std::string& request_id,
                          const Provenance& provenance) {
  std::string how;
  put_uint(how, 1, provenance.batch_requests);
  put_uint(how, 2, provenance.batch_rows);
  put_uint(how, 3, provenance.queue_us);
  put_uint(how, 4, provenance.execute_us);
  const auto task_size = [](const TaskScores& task) {
    return field_size(task.task.size()) + field_size(4 * task.count) +
           (task.width ? 1 + wire::varint_size(task.width) : 0);
  };
  size_t size = field_size(model.name.size()) + field_size(model.version.size()) + field_size(how.size());
  if (!request_id.empty()) size += field_size(request_id.size());
  for (const TaskScores& task : scores) size += field_size(task_size(task));
  std::string out = framed(size);
  put_text(out, 1, model.name);
  put_text(out, 2, model.version);
  if (!request_id.empty()) put_text(out, 3, request_id);
  for (const TaskScores& task : scores) {
    put_tag(out, 4, task_size(task));
    put_text(out, 1, task.task);
    put_tag(out, 2, 4 * task.count);
    put_floats(out, task);
    put_uint(out, 3, task.width);
  }
  put_text(out, 5, how);
  return out;
}

}  // namespace narsil::native
